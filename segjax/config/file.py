"""Config files: Python files with a function `get_config`, in any folder, that may import their neighbours.

Those that are shipped are also known by their names, from any working directory.
"""

import contextlib
import importlib.util
import pathlib
import re
import sys
import traceback
import types

from ml_collections import config_dict

from segjax import config as config_lib
from segjax.config import CONFIG_FILE, ConfigError, schema_problem, suggest

# The shipped configs are beside the package in a checkout, and in it where it is installed.
_FOLDERS = (pathlib.Path(__file__).parents[1] / "configs", pathlib.Path(__file__).parents[2] / "configs")
SHIPPED = {path.stem: path for path in sorted(next(filter(pathlib.Path.is_dir, _FOLDERS), _FOLDERS[0]).glob("*.py"))}
_PACKAGE = "segjax_config_files"  # What the files of a config's folder belong to while it is loaded.


def load(argument: str) -> config_dict.ConfigDict:
  """The locked config that `get_config()` of a file returns.

  The file's folder is searched first for what it imports (`import base`), as for a program; `from . import base` means
  the same, and `from folder import base` the folder's own name. The working directory does not matter.

  Args:
    argument: "FILE.py", or "FILE.py:TEXT" for `get_config(TEXT)`; `~` is the home folder. "NAME" and "NAME:TEXT" are
      shipped configs, and so is "configs/NAME.py" where there is no such file. "segjax/config/__init__.py:WORKDIR" is the
      config that a run saved.

  Raises:
    ConfigError: no such file or name, no config in it, or whatever its code raises, with file and line.
  """
  path, text = _split(argument)
  if text is not None and path.samefile(config_lib.__file__):
    return config_lib.load(text)
  with _neighbours(path.parent.absolute()):
    try:
      spec = importlib.util.spec_from_file_location(f"{_PACKAGE}.{path.stem}", path.absolute())
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} defines no function get_config, so it is no config file. Add one, as in configs/.")
      config = module.get_config() if text is None else module.get_config(text)
    except ConfigError:
      raise
    except Exception as error:  # It is the user's code, which raises what it likes.
      raise ConfigError(_located(error, path)) from error
  problem = schema_problem(config)
  if problem:
    raise ConfigError(f"{path}: {problem}. Let it begin with default_config, and set fields that exist.")
  return config.lock()


def _split(argument: str) -> tuple[pathlib.Path, str | None]:
  """The file, and the text for `get_config` behind ".py:" or a shipped config's name and ":"."""
  name, colon, text = argument.partition(".py:")
  path = pathlib.Path(f"{name}.py" if colon else name).expanduser()
  if path.is_file() and path.suffix == ".py":
    return path, text if colon else None
  # As the README and the configs' headers write it, so that their commands hold outside of a checkout.
  name, colon, text = argument.removeprefix("configs/").replace(".py:", ":").partition(":")
  name = name.removesuffix(".py")
  if name in SHIPPED:
    return SHIPPED[name], text if colon else None
  saved = path if path.is_dir() else path.parent
  if path.exists() and (saved / CONFIG_FILE).is_file():
    remedy = f"It belongs to a run, whose config --workdir={saved} takes without --config."
  else:
    remedy = f"Name a Python file, e.g. --config=configs/quickstart.py, or a shipped config: {', '.join(SHIPPED)}."
    remedy += suggest(pathlib.Path(name).name, SHIPPED)
  raise ConfigError(f"{argument}: {'no config file' if path.exists() else 'no such file'}. {remedy}")


@contextlib.contextmanager
def _neighbours(folder: pathlib.Path):
  """Lets a config file import those beside it, and forgets them afterwards: another folder may have the same names."""
  package = types.ModuleType(_PACKAGE)
  package.__path__ = [str(folder)]
  search, known = list(sys.path), set(sys.modules)
  sys.modules[_PACKAGE] = package
  sys.path[:] = [str(folder), *search, str(folder.parent)]
  try:
    yield
  finally:
    sys.path[:] = search
    for name in set(sys.modules) - known:
      module = sys.modules[name]
      files = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
      if any(file and pathlib.Path(file).is_relative_to(folder) for file in files):
        del sys.modules[name]


def _located(error: Exception, path: pathlib.Path) -> str:
  """An error in a config file as "FILE, line 3: what", with the last line that is of its folder."""
  lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
  if isinstance(error, SyntaxError) and error.filename:
    lines.append((error.filename, error.lineno))
  own = [line for line in lines if pathlib.Path(line[0]).is_relative_to(path.parent.absolute())]
  file, line = own[-1] if own else (path, None)
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  text = re.sub(r'Other fields present: ".*}"(\\n)?', "", text, flags=re.DOTALL)  # The whole config.
  what = text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
  return f"{file}{f', line {line}' if line else ''}: {what}"
