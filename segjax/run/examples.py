"""The examples that a run began with. A resumed run must have the same, or its ids, scores and classes would mean others.

WORKDIR/examples_SPLIT.json holds their names in the order of their ids, and size, time of change and checksum of each
file. A resumed run compares sizes and times; where only a time differs, as in a copy of the data set, the checksum decides.
It covers the first and the last 64 KiB, so that all files take about as long as reading their headers, which each start
does. A change that leaves size and time, or size and both ends, goes unnoticed.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Mapping, Sequence

from segjax.config import ConfigError
from segjax.files import atomic
from segjax.input_pipeline import DataError, images
from segjax.input_pipeline.bad_examples import BadExamples

_END = 2**16  # Bytes. Disks read about as much ahead when a header is read.
_CHUNK, _THREADS = 500, 16  # Files that a thread looks at in a row; threads, which mostly wait for the file system.


def check_examples(config, sources: Mapping[str, object], workdir: pathlib.Path, bad: BadExamples) -> None:
  """Records the examples of {split: source} when a run begins; later they must be the same.

  Args:
    bad: of the run. Its training examples may change, and so may any that is unreadable now, where some may be bad.

  Raises:
    ConfigError: names that went or came, files that changed, or other classes; or a damaged record.
    DataError: a file that is not there.
  """
  for split, source in sources.items():
    trains = split == config.data.train_split
    _check(source, split, workdir, bad if trains and bad.most else None, trains and config.loss.border_weight > 0)


def _check(source, split: str, workdir: pathlib.Path, bad: BadExamples | None, border: bool) -> None:
  path = workdir / f"examples_{urllib.parse.quote(split, safe='')}.json"
  names = [source.describe(index) for index in range(len(source))]
  files = source.files(border)
  if not path.exists():
    found = {role: _each(lambda file: [*_state(file), _checksum(file)], paths) for role, paths in files.items()}
    atomic.write_text(path, json.dumps(dict(classes=source.classes, names=names, files=found)))
    return
  try:
    saved = json.loads(path.read_text())
    problems = _differences(names, saved["names"])
    if list(source.classes) != saved["classes"]:
      problems.append(f"classes {saved['classes']} -> {list(source.classes)}")
    changed = [] if problems else _changed(files, saved["files"])
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{path}: damaged ({error}). Restore it, or give another --workdir.") from error
  if bad is not None and files["image"]:
    changed = [(i, file) for i, file in changed if names[i] not in bad.names and _readable(source, i)]
  if changed:
    problems.append(f"changed {images.listed(images.printable(str(file)) for _, file in changed)}")
  if problems:
    raise ConfigError(
      f"The examples of {split!r} are not those that the run in {workdir} began with ({path.name}):"
      f" {'; '.join(problems)}. Restore them, or give another --workdir."
    )


def _differences(names: list[str], before: list[str]) -> list[str]:
  if names == before:
    return []
  gone, new = sorted(set(before) - set(names)), sorted(set(names) - set(before))
  changes = [f"missing {images.listed(gone)}"] if gone else []
  changes += [f"new {images.listed(new)}"] if new else []
  return changes or ["another order"]


def _changed(files: dict[str, list[pathlib.Path]], saved: dict[str, list]) -> list[tuple[int, pathlib.Path]]:
  """(index in its list, path) of the files that differ from what was saved of them.

  Where other files are read than before, because data.format changed, names alone are compared.
  """

  def differs(item):
    file, (size, time, checksum) = item
    state = _state(file)
    return state[0] != size or (state[1] != time and _checksum(file) != checksum)

  changed = []
  for role in files.keys() & saved.keys():
    paths, before = files[role], saved[role]
    if len(paths) == len(before):
      found = _each(differs, list(zip(paths, before)))
    else:
      found = [bool(before)] * len(paths)
    changed += [(index, file) for index, (file, other) in enumerate(zip(paths, found)) if other]
  return sorted(changed)


def _each(function: Callable, items: Sequence) -> list:
  """[function(item) for item in items], in threads."""
  chunks = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    done = pool.map(lambda chunk: [function(item) for item in chunk], chunks)
    return [result for chunk in done for result in chunk]


def _state(path: pathlib.Path) -> tuple[int, int]:
  try:
    state = os.stat(path)
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror}). Restore it.") from error
  return state.st_size, state.st_mtime_ns


def _checksum(path: pathlib.Path) -> str:
  try:
    images.check_regular(path)
    with path.open("rb") as file:
      content = file.read(2 * _END + 1)
      if len(content) > 2 * _END:
        file.seek(-_END, os.SEEK_END)
        content = content[:_END] + file.read(_END)
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror}). Restore it.") from error
  return hashlib.blake2b(content, digest_size=8).hexdigest()


def _readable(source, index: int) -> bool:
  try:
    source[index]
  except DataError:
    return False
  return True
