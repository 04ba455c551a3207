"""Flags and error messages that the commands of segjax share."""

import contextlib
import ctypes
import io
import platform
import runpy
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from segjax import config as config_lib
from segjax import config_rules, user_cache
from segjax.input_pipeline import images

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; --config.field=value overrides. Without it, the config saved in --workdir.",
  lock_config=True,
)  # fmt: skip

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # Of malloc.h.


def with_saved_config(argv: list[str]) -> list[str]:
  """Where no --config is given, the one that the run in --workdir saved: to score it, or to go on."""
  named = [a.lstrip("-").partition("=") for a in argv if a.startswith("-")]
  workdirs = [value for name, equals, value in named if name == "workdir" and equals]
  workdirs += [value for name, value in zip(argv, argv[1:]) if name.lstrip("-") == "workdir" and name.startswith("-")]
  if any(name == "config" for name, _, _ in named) or not workdirs:
    return argv
  return [argv[0], f"--config={config_lib.__file__}:{workdirs[-1]}", *argv[1:]]


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a misspelt config field, in the file or on the command line, ends with a suggestion."""
  _check_config_names(argv)
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, TypeError, ValueError) as error:
    _stop(str(error))
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell much that a run's own report need not show.
  return rest


def _check_config_names(argv: list[str]) -> None:
  """Loads the config file, and looks up every --config.field: config_flags ends both kinds of mistake in a traceback."""
  named = [argument.lstrip("-").partition("=") for argument in argv[1:] if argument.startswith("-")]
  files = [value for name, _, value in named if name == "config"]
  if not files:
    return
  path, colon, argument = files[-1].partition(":")
  try:
    get_config = runpy.run_path(path)["get_config"]
    known = config_lib.fields(get_config(argument) if colon else get_config())
  except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
    _stop(f"--config={files[-1]}: {error.args[-1] if isinstance(error, OSError) else error}")
  for name, _, _ in named:
    field = name.removeprefix("config.")
    if field != name and field not in known:
      _stop(f"{name}: no such field.{config_lib.suggest(field, known)}")


def config(data_dir: str = ""):
  """The config of the command line, complete and checked.

  Args:
    data_dir: stands in for an empty `config.data.dir`.

  Raises:
    ConfigError: listing every problem.
  """
  if _CONFIG.value is None:
    raise app.UsageError("Name a config, e.g. --config=configs/quickstart.py, or the --workdir of a run.")
  resolved = config_lib.finalize(_CONFIG.value)
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
  time, so that all its pages fault again: a quarter of a step (benchmarks/torch.md). So glibc shall neither map large
  blocks nor give any back; and since that works for the main thread only, it is the main thread that runs the steps.
  """
  import jax

  jax.config.update("jax_cpu_enable_async_dispatch", False)
  if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
      mallopt(option, value)


@contextlib.contextmanager
def readable_errors(*more: type[Exception]):
  """Ends the program with the bare message of errors that tell the user what to do: DataError, ConfigError, `more`."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # Names of files need not be UTF-8.
  try:
    yield
  except (images.DataError, config_lib.ConfigError, *more) as error:
    _stop(str(error))


def _stop(message: str):
  print(f"segjax: {message}", file=sys.stderr)
  sys.exit(2)
