"""Output that survives a closed pipe, a full log, and a terminal without the character."""

import contextlib
import os
import sys
from collections.abc import Iterator


class _LastingStream:
  """A text stream whose writes do not fail where its file is closed or full, or cannot encode a character.

  Attributes:
    lost: the last error; None where all was written.
  """

  def __init__(self, stream):
    self._stream, self.lost = stream, None

  def __getattr__(self, name: str):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    try:
      try:
        self._stream.write(text)
      except UnicodeEncodeError:
        encoding = self._stream.encoding
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))  # Names need not be UTF-8.
    except (OSError, ValueError) as error:  # A closed file is a ValueError.
      self.lost = error
    return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except (OSError, ValueError) as error:
      self.lost = error

  def end(self) -> None:
    """Drops what still cannot be written: the interpreter would end with exit code 120 for it."""
    self.lost = None
    self.flush()
    if self.lost is not None:
      with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as null:  # No file at all.
        os.dup2(null.fileno(), self._stream.fileno())
      self.flush()


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
  """In its block a closed pipe (`| head`) or a full log loses lines, and fails nothing."""
  streams = {name: _LastingStream(getattr(sys, name)) for name in ("stdout", "stderr") if getattr(sys, name)}
  before = {name: getattr(sys, name) for name in streams}
  for name, stream in streams.items():
    setattr(sys, name, stream)
  try:
    yield
  finally:
    for name, stream in streams.items():
      if stream.lost is not None:
        print(f"note: {name} could not be written ({stream.lost}); lines are missing there", file=sys.stderr)
    for name, stream in streams.items():
      setattr(sys, name, before[name])
      stream.end()
