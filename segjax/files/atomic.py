"""Files written whole or not at all, even if the writer is stopped: under a temporary name, then renamed."""

import contextlib
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file that takes the place of `path` when the block ends, and is removed where it fails.

  Several threads or processes may write the same path: the last to finish replaces the others' file.
  """
  temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    with temporary.open("wb") as file:
      yield file
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: pathlib.Path, text: str) -> None:
  """`whole_file` for text, in UTF-8."""
  with whole_file(path) as file:
    file.write(text.encode())
