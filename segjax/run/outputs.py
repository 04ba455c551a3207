"""Files that are named after examples. These names come from outside (ids in TFDS's records, lines of lists, archives), so
each is checked before any work is done: that it stays below its folder, and that it can be written.
"""

import collections
import hashlib
import pathlib
from collections.abc import Iterable

from segjax.input_pipeline import DataError, images

MAX_NAME, MAX_PATH = 255, 4095  # Bytes, of most file systems and of Linux.
_MAX_PICTURE = 143  # Bytes that every file system takes, encrypted ones too: a picture is not worth a failure.


def output_path(folder: pathlib.PurePath, name: str) -> pathlib.PurePath:
  """`folder`/`name`, which lies below the folder; "a/b" is in a subfolder.

  Raises:
    DataError: it would lie elsewhere, or its name is too long.
  """
  path, shown = pathlib.PurePosixPath(name), images.printable(name)
  if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
    raise DataError(f"{shown!r} names no file below {folder}, so nothing is written for it. Rename that example.")
  length = max(len(_bytes(part)) for part in path.parts)
  if length > MAX_NAME or len(_bytes(str(folder / path))) > MAX_PATH:
    raise DataError(
      f"{shown}: too long for a file's name ({length} bytes of {MAX_NAME}, the whole path of {MAX_PATH}). Shorten it."
    )
  return folder / path


def _bytes(name: str) -> bytes:
  return name.encode(errors="surrogateescape")  # As Python has names that are no UTF-8.


def check_outputs(folder: pathlib.Path, names: Iterable[str]) -> None:
  """Raises DataError where `output_path` would for one of the names, or where two examples have the same."""
  count = collections.Counter(output_path(folder, name) for name in names)
  if twice := [str(path.relative_to(folder)) for path, n in count.items() if n > 1]:
    raise DataError(
      f"Several examples would be written as {images.listed(map(images.printable, twice))}. Rename all but one, or"
      " remove what is listed twice."
    )


def flat_names(names: Iterable[str], suffix: str) -> dict[str, str]:
  """{name: file name, all different, without folders}; long ones are cut, and end in a checksum."""
  files = {}
  for name in names:
    flat = name.replace("/", "_")
    if len(_bytes(flat + suffix)) > _MAX_PICTURE or flat + suffix in files.values():
      checksum = hashlib.blake2b(_bytes(name), digest_size=6).hexdigest()
      cut = _bytes(flat)[: _MAX_PICTURE - len(suffix) - len(checksum) - 1]
      flat = f"{cut.decode(errors='ignore')}_{checksum}"
    files[name] = flat + suffix
  return files
