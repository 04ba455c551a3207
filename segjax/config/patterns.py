"""The patterns by which options name parameters: optimizer.freeze, optimizer.lr_multipliers, init.exclude."""

import fnmatch
import math
from collections.abc import Collection

from segjax.config import ConfigError


def match(pattern: str, paths: Collection[str]) -> set[str]:
  """The paths that a pattern names.

  A pattern is a path ("logits/bias") or the first parts of one ("backbone", "aspp/pooling"). `*` stands for any
  characters, "/" included ("*/bias"), `?` for one, `[ab]` for one of these. "!backbone" names all that "backbone" does not,
  and nothing where that names nothing, which is a mistake.

  Args:
    paths: as "backbone/conv1/kernel".
  """
  if pattern.startswith("!"):
    named = match(pattern[1:], paths)
    return set(paths) - named if named else named
  pattern = pattern.rstrip("/")
  return {path for path in paths if any(fnmatch.fnmatchcase(path, p) for p in (pattern, f"{pattern}/*"))}


def match_each(field: str, patterns: Collection[str], paths: Collection[str], kind: str) -> list[set[str]]:
  """What each pattern of an option names.

  Args:
    field: the option, and `kind` the paths, for messages.

  Raises:
    ConfigError: patterns that name nothing, with examples of paths.
  """
  found = [match(pattern, paths) for pattern in patterns]
  if useless := [pattern for pattern, named in zip(patterns, found) if not named]:
    parts = sorted({path.partition("/")[0] for path in paths})
    longest = sorted(paths, key=lambda path: (-path.count("/"), path))
    raise ConfigError(
      f"config.{field}: no {kind} matches {', '.join(map(repr, useless))}. They begin with {', '.join(parts)}; whole paths are"
      f" e.g. {', '.join(dict.fromkeys((*sorted(paths)[:2], *longest[:1])))}. Patterns are such paths or their first parts, with"
      " * for any characters and ! for all but."
    )
  return found


def with_factor(text: str) -> tuple[str, float]:
  """("backbone", 0.1) of "backbone:0.1".

  Raises:
    ConfigError: no pattern, or no finite factor above 0.
  """
  pattern, _, number = str(text).rpartition(":")
  try:
    factor = float(number)
  except ValueError:
    factor = math.nan
  if not pattern or not 0 < factor < math.inf:
    raise ConfigError(
      f'{text!r} must be "PATTERN:FACTOR" with a finite factor above 0, e.g. "backbone:0.1". What shall not be trained belongs'
      " in optimizer.freeze."
    )
  return pattern, factor
