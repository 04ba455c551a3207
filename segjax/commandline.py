"""Flags and error messages that the commands of segjax share."""

import contextlib
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from segjax import config as config_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file; --config.field=value overrides. Without it, the config saved in --workdir.",
  lock_config=True,
)  # fmt: skip


def with_saved_config(argv: list[str]) -> list[str]:
  """Where no --config is given, the one that the run in --workdir saved: to score it, or to go on."""
  named = [a.lstrip("-").partition("=") for a in argv]
  workdirs = [value for name, _, value in named if name == "workdir"]
  if any(name == "config" for name, _, _ in named) or not workdirs:
    return argv
  return [argv[0], f"--config={config_lib.__file__}:{workdirs[-1]}", *argv[1:]]


def parse(argv: list[str]) -> list[str]:
  """Parses flags; a misspelt config field, in the file or on the command line, ends with a suggestion."""
  try:
    rest = flags.FLAGS(argv)
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell much that a run's own report need not show.
    return rest
  except flags.Error as error:
    _stop(f"{error}\nSee python -m {pathlib.Path(argv[0]).stem} --help.")
  except (AttributeError, KeyError, TypeError, config_lib.ConfigError, FileNotFoundError) as error:
    names = [a.lstrip("-").partition("=")[0] for a in argv if a.lstrip("-").startswith("config.")]
    base = _CONFIG.value
    if base is None:  # The config file itself failed.
      _stop(f"--config: {error}")
    known = config_lib.fields(base)
    for name in (name.removeprefix("config.") for name in names):
      if name not in known:
        _stop(f"config.{name}: no such field.{config_lib.suggest(name, known)}")
    _stop(str(error))


def config():
  """The config of the command line, complete and checked.

  Raises:
    ConfigError: listing every problem.
  """
  if _CONFIG.value is None:
    raise app.UsageError("Name a config, e.g. --config=configs/quickstart.py, or the --workdir of a run.")
  resolved = config_lib.finalize(_CONFIG.value)
  config_lib.validate(resolved)
  return resolved


@contextlib.contextmanager
def readable_errors():
  """Ends the program with the bare message of the errors that tell the user what to do."""
  from segjax.input_pipeline import DataError

  try:
    yield
  except (DataError, config_lib.ConfigError) as error:
    _stop(str(error))


def _stop(message: str):
  print(f"segjax: {message}", file=sys.stderr)
  sys.exit(2)
