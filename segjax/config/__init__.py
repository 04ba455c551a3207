"""The config of a run: its schema, made from options.py and from constructors' signatures; how it is saved and loaded.

A config file starts from `default_config(model=..., data=...)` and sets what differs. The result is locked and
typed, so a misspelt field or a wrong type stops in the file as on the command line. `model` and `data` choose which
`config.model.*` and `config.data.*` fields exist: they are exactly the constructor arguments of that model and
that data source, so an option that nothing reads cannot be set; one that cannot act under the others must stay at its
default. Ranges and combinations: rules.py.
"""

import copy
import difflib
import json
import os
import pathlib
from collections.abc import Collection

from ml_collections import config_dict

from segjax.config import options
from segjax.files import atomic

IGNORE_LABEL = 255  # Void, everywhere inside segjax: no loss, no gradient, no score.
CONFIG_FILE = "config.json"  # In the workdir.

# Default of each option by model and by data source: the arguments of their constructors.
MODELS = {name: options.defaults(of_model) for name, of_model in options.models().items()}
SOURCES = {name: options.defaults(of_source) for name, of_source in options.sources().items()}

# What a resumed run may change: none of these alters the updates from here on (num_steps does so through the
# schedule, and what is evaluated how often through a plateau policy, which then starts to count again; both are printed).
HARMLESS = (
  *("num_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "profile_steps"),
  "trackers",
  *("mesh", "shard_state", "remat", "kernels", "eval", "init", "policy.early_stop"),
  *(f"data.{field}" for field in ("dir", "eval_split", "loader", "workers", "cache", "max_bad_examples", "format")),
)

PATHS = ("data.dir", "init.path", "compilation_cache")  # Fields in which ~ is the home folder.


class ConfigError(ValueError):
  """A config, or something it names, that cannot be used. The message names every problem found and its remedy."""


def default_config(model: str = "unet", data: str = "folder") -> config_dict.ConfigDict:
  """The whole schema with its defaults, locked.

  Args:
    model: a name in `MODELS`; decides the fields of `config.model`.
    data: a name in `SOURCES`; decides the fields of `config.data`.

  Raises:
    ConfigError: an unknown name, with the list of known ones.
  """
  for field, name, known in (("model.name", model, MODELS), ("data.name", data, SOURCES)):
    if name not in known:
      raise ConfigError(f"{field}: {name!r} is none of {', '.join(known)}.")
  sections = {name: options.defaults(section) for name, section in options.sections().items()}
  top = sections.pop("")
  sections["model"] = dict(name=model, **MODELS[model])
  sections["data"] = dict(name=data, **options.defaults(options.DATA), **SOURCES[data])
  return config_dict.ConfigDict(copy.deepcopy(top | sections)).lock()


def finalize(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Normalises what the command line gives: "a,b" in a tuple of strings becomes two items, ~ the home folder.

  Raises:
    ConfigError: the home of an unknown user.
  """
  config = config.copy_and_resolve_references()
  for name, value in fields(config).items():
    if name in PATHS and isinstance(value, str):
      _set(config, name, expand_home(value))
    elif isinstance(value, tuple) and any(isinstance(item, str) for item in value):
      _set(config, name, tuple(part.strip() for item in value for part in str(item).split(",")))
  return config


def expand_home(path: str) -> str:
  """`path` with ~ and ~user replaced.

  Raises:
    ConfigError: an unknown user.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    raise ConfigError(f"{path}: no such user. Write ./{path} for what is named so in this folder.")
  return expanded


def fields(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, object]:
  """All leaves as {"optimizer.base_lr": 0.01, ...}."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      leaves |= fields(value, f"{prefix}{key}.")
    else:
      leaves[prefix + key] = value
  return leaves


def changed(leaves: dict[str, object]) -> dict[str, tuple[object, object]]:
  """{field: (value, default)} of the leaves that differ from the defaults of their model and data source.

  Args:
    leaves: of `fields`, of this version or an earlier one, or as JSON has them, with lists for tuples; a field that is no
      more has the default None.
  """
  default = fields(default_config(leaves["model.name"], leaves["data.name"]))
  plain = lambda value: list(value) if isinstance(value, tuple) else value  # noqa: E731
  pairs = {name: (value, default[name] if name in default else None) for name, value in leaves.items()}
  return {name: pair for name, pair in pairs.items() if plain(pair[0]) != plain(pair[1])}


def schema_problem(config) -> str:
  """Which fields are not those of the config's model and data source, or ''.

  Raises:
    ConfigError: an unknown model or data source.
  """
  try:
    have = fields(config).keys()
    want = fields(default_config(model=config.model.name, data=config.data.name)).keys()
  except (AttributeError, KeyError, TypeError):
    return "no config of segjax, which begins with segjax.config.default_config(model=..., data=...)"
  return "" if have == want else f"unknown {sorted(have - want)}, missing {sorted(want - have)}"


def suggest(name: str, names) -> str:
  """' Did you mean x?' for a misspelt field or class name, or ''. Also finds a leaf named without its section."""
  names = list(names)
  leaf = name.rpartition(".")[2]
  close = difflib.get_close_matches(name, names, 1) or [n for n in names if n.rpartition(".")[2] == leaf][:1]
  return f" Did you mean {close[0]}?" if close else ""


def to_json(config: config_dict.ConfigDict) -> str:
  """The resolved config as indented JSON."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def save(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> None:
  """Writes the resolved config to `workdir`/config.json, whole or not at all."""
  atomic.write_text(pathlib.Path(workdir) / CONFIG_FILE, to_json(config))


def load(workdir: str | os.PathLike) -> config_dict.ConfigDict:
  """Reads the config a run saved; the inverse of `save`.

  Raises:
    ConfigError: no such file, or one that this version of segjax cannot read, with the fields that differ.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  if not path.is_file():
    raise ConfigError(f"{path}: no such file, so {workdir} is not the workdir of a run. Check --workdir.")
  try:
    saved = config_dict.ConfigDict(json.loads(path.read_text()))
    config = default_config(model=saved.model.name, data=saved.data.name)
    problem = schema_problem(saved)
  except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(
      f"{path}: not a saved config ({error}). Restore the file, or start with a new --workdir."
    ) from error
  if problem:
    raise ConfigError(
      f"{path} was written by another version of segjax: {problem}. Use that version, or start with a new --workdir."
    )
  for name, value in fields(saved).items():
    try:
      _set(config, name, tuple(value) if isinstance(value, (list, tuple)) else value)
    except (TypeError, ValueError, OverflowError) as error:
      raise ConfigError(f"{path}: {name} = {value!r} is of the wrong type ({error}). Restore the file.") from error
  return config


def differences(config: config_dict.ConfigDict, saved: config_dict.ConfigDict, idle: Collection[str] = ()) -> list[str]:
  """Fields in which `config` may not continue the run of `saved`, as 'name: saved -> new' lines.

  Args:
    idle: fields that cannot act in `config`, see `rules.idle`; they alter nothing from here on.
  """
  new, old = fields(config), fields(saved)
  return [
    f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
    for name in sorted(new.keys() | old.keys())
    if new.get(name) != old.get(name) and not any(name == h or name.startswith(h + ".") for h in (*HARMLESS, *idle))
  ]


def _set(config: config_dict.ConfigDict, name: str, value) -> None:
  section, _, leaf = name.rpartition(".")
  (config[section] if section else config)[leaf] = value
