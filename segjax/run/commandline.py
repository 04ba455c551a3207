"""What the commands of segjax share: flags, and how they end."""

import contextlib
import ctypes
import functools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.config import file as config_file
from segjax.config import rules as config_rules
from segjax.files import user_cache
from segjax.input_pipeline import images
from segjax.run import streams

flags.disclaim_key_flags()  # --help shows what `define_path` defines as a flag of its caller.

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # Of malloc.h.


class _Path(flags.ArgumentParser):
  """A path, in which ~ is the home folder."""

  def parse(self, argument: str) -> str:
    if not argument:
      raise ValueError("names no file or folder")
    return config_lib.expand_home(argument)


def define_path(name: str, default: str | None, help: str, **options) -> flags.FlagHolder:
  """A flag that names a file or folder."""
  return flags.DEFINE(_Path(), name, default, help, **options)


def define_json() -> flags.FlagHolder:
  """--json, for `append_json`."""
  return define_path("json", None, "File that the figures are appended to, a JSON object a line.")


def check_json(path: str | None) -> None:
  """Raises ConfigError where `append_json` could not write, before anything is measured."""
  if path:
    try:
      open(path, "a").close()
    except OSError as error:
      raise ConfigError(f"--json={path} cannot be written ({error}). Give another file.") from error


def append_json(path: str | None, row: dict) -> str:
  """A row of figures with date and version of JAX as a line of JSON, which is appended to the file where there is one."""
  import jax

  line = json.dumps(dict(date=time.strftime("%Y-%m-%d"), jax=jax.__version__, **row))
  if path:
    with open(path, "a") as file:
      file.write(line + "\n")
  return line


class _ConfigFile(flags.ArgumentParser):
  """Loads the file of --config, and refuses misspelt overrides of `argv` with a suggestion.

  Replaces the parser of config_flags, which ends both mistakes in a traceback, and finds no neighbouring files.
  """

  def __init__(self, argv: list[str]):
    self._argv = argv

  def parse(self, argument: str):
    with readable_errors():
      config = config_file.load(argument)
      known = config_lib.fields(config)
      for field in (found[1] for word in self._argv if (found := re.match(r"--?(?:no)?config\.([^=]+)", word))):
        if field not in known:
          raise ConfigError(f"config.{field}: no such field.{config_lib.suggest(field, known)}")
    return config


def run(main: Callable[[list[str]], None], *, positional: bool = False, takes_config: bool = True) -> None:
  """Runs a command: `main` gets the command line, its flags parsed. Wrong flags end with a message and exit code 2.

  Where no --config is given, the one that the run in --workdir saved is taken: to score it, or to go on.

  Args:
    positional: whether the command takes arguments that are no flags.
    takes_config: whether it takes --config.
  """
  # TensorFlow computes nothing here: its messages about how it would do not belong into reports.
  for name, value in (("TF_ENABLE_ONEDNN_OPTS", "0"), ("TF_CPP_MIN_LOG_LEVEL", "1")):
    os.environ.setdefault(name, value)
  with readable_errors(flags.Error):
    argv = flags.FLAGS.read_flags_from_files(sys.argv)
    configs, workdirs = _values(argv, "config"), _values(argv, "workdir")
    if len(configs) > 1:
      raise ConfigError(f"--config is given {len(configs)} times ({', '.join(configs)}). Name one config.")
    if workdirs and not configs:
      argv = [argv[0], f"--config={config_lib.__file__}:{config_lib.expand_home(workdirs[-1])}", *argv[1:]]
  if takes_config:
    text = "Config file, or the name of a shipped config; --config.field=value overrides. Without it, the config saved in --workdir."
    config_flags.DEFINE_config_file("config", None, text, sys_argv=argv)
    flags.FLAGS["config"].parser = _ConfigFile(argv)
  try:
    with streams.lasting_output():
      app.run(main, flags_parser=functools.partial(_parse, positional=positional), argv=argv)
  except KeyboardInterrupt:
    print("segjax: interrupted", file=sys.stderr)
    sys.exit(130)  # As a shell reports it.


def _values(argv: list[str], name: str) -> list[str]:
  """What `--name=value` and `--name value` give."""
  words = [(*word.partition("="), following) for word, following in zip(argv, [*argv[1:], ""])]
  return [
    value if equals else following for flag, equals, value, following in words if flag in (f"-{name}", f"--{name}")
  ]


def _parse(argv: list[str], positional: bool = False) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    stop(str(error))
  except SystemExit as end:
    sys.exit(0 if end.code == 1 else end.code)  # Absl ends with 1 after --help.
  if len(rest) > 1 and not positional:
    stop(f"unknown argument {rest[1]!r}. Options look like --config.num_steps=100; --help lists the others.")
  if not flags.FLAGS["verbosity"].present:
    # Orbax warns of what is meant: a checkpoint without a score, one that is only read.
    logging.set_verbosity(logging.ERROR)
  return rest


def config(data_dir: str = ""):
  """The config of the command line, complete and checked.

  Args:
    data_dir: stands in for an empty `config.data.dir`.

  Raises:
    ConfigError: listing every problem.
  """
  if flags.FLAGS.config is None:
    raise ConfigError("Name a config, e.g. --config=quickstart, or the --workdir of a run.")
  resolved = config_lib.finalize(flags.FLAGS.config)
  if resolved.data.name != "synthetic":  # Which has none.
    resolved.data.dir = resolved.data.dir or data_dir
  config_rules.validate(resolved)
  return resolved


def enable_float64(config) -> None:
  """Lets JAX compute in float64 where the config says so; before the first array is made."""
  if config.dtype == "float64":
    import jax  # Not earlier: --help and config errors should not wait for it.

    jax.config.update("jax_enable_x64", True)


def enable_compilation_cache() -> None:
  """Lets JAX keep what it compiles in the user's cache folder; before anything is compiled.

  Programs from there are executed, so neither a config nor a workdir, which may be somebody else's, can name the folder:
  only the environment does (JAX_COMPILATION_CACHE_DIR; JAX_ENABLE_COMPILATION_CACHE=false for none).
  """
  import jax

  if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    jax.config.update("jax_compilation_cache_dir", str(user_cache.folder("compilation")))
  except config_lib.ConfigError as error:  # A run need not fail for what only spares time.
    print(f"note: compiled programs are not kept. {error}", file=sys.stderr)


def keep_freed_memory() -> None:
  """Where the CPU trains, lets a step have the memory of the last one; before the first array is made.

  XLA:CPU takes the temporaries of a step from malloc in one block, which glibc asks the system for and gives back each
  time, so that all its pages fault again: a quarter of a step (benchmarks/torch.md). So glibc is told neither to map large
  blocks nor to return any; and since that works for the main thread only, the main thread runs the steps.

  Raises:
    ConfigError: JAX finds no device of the platform in JAX_PLATFORMS.
  """
  import jax

  jax.config.update("jax_cpu_enable_async_dispatch", False)
  try:
    backend = jax.default_backend()
  except (RuntimeError, AssertionError) as error:  # The latter where a known platform has no plugin.
    raise ConfigError(
      f"JAX cannot use JAX_PLATFORMS={jax.config.jax_platforms} ({str(error) or 'it has no such device'}). Set it to another,"
      " or leave it out."
    ) from error
  if backend == "cpu" and platform.libc_ver()[0] == "glibc":
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
      mallopt(option, value)


@contextlib.contextmanager
def readable_errors(*more: type[Exception]):
  """Ends the program with the message alone of errors that name a remedy: DataError, ConfigError, `more`."""
  try:
    yield
  except (images.DataError, ConfigError, *more) as error:
    stop(str(error))


def refuse(command: str) -> None:
  """Ends `python -m` of a module that is no command: it would do nothing, and seem to succeed."""
  stop(f"this module is no command. Run: python -m segjax.{command}")


def stop(message: str):
  """Ends the program with a message and exit code 2."""
  print(f"segjax: {message}", file=sys.stderr)
  sys.exit(2)
