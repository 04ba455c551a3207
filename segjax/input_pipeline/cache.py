"""A cache of what is slow to compute from files: in the user's cache folder, or in memory (config.data.cache)."""

import functools
import hashlib
import json
import mmap
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import PIL

from segjax.config import ConfigError
from segjax.files import atomic, user_cache
from segjax.input_pipeline.images import DataError

_sound = {}  # {path: state of the file} whose checksum this process has compared.


def file_state(path: str | os.PathLike) -> str:
  """Size and time of change of a file; where they are the same, so is its content.

  Raises:
    DataError: it is gone.
  """
  try:
    status = os.stat(path)
  except OSError as error:
    raise DataError(
      f"{path}: cannot be read ({error.strerror}). Restore it, or remove its name from the split."
    ) from error
  return f"{status.st_size} {status.st_mtime_ns}"


@functools.cache
def code_state() -> str:
  """A checksum of the code that reads files: what another version cached is computed again."""
  digest = hashlib.sha256(PIL.__version__.encode())
  for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def path_of(kind: str, name: str) -> pathlib.Path:
  """Where `arrays` keeps what is called `name`.

  Raises:
    ConfigError: the cache folder cannot be made or trusted.
  """
  return user_cache.folder(kind) / hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]


def arrays(kind: str, name: str, state: str, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
  """What `make()` gives, from a file that is mapped into memory; made, and the file written, where there is none.

  A file that was made in another state, by other code, or is damaged, is replaced. Any number of threads and processes
  may do so at once: files appear whole. A full disk is reported once, and the arrays are not kept.

  Args:
    kind: folder in the user's cache folder.
    name: what the arrays are made from, and how.
    state: of what they are made from, see `file_state`.

  Returns:
    Arrays that cannot be written to.

  Raises:
    ConfigError: the cache folder cannot be made or trusted.
  """
  path, state = path_of(kind, name), f"{state} {code_state()}"
  found = _read(path, state)
  if found is None:
    found = make()
    try:
      _write(path, state, found)
    except OSError as error:
      _say_once(f"note: {path.parent} cannot be written ({error}), so what is not in it yet is computed each time")
  return found


@functools.cache
def _say_once(message: str) -> None:
  print(message, flush=True)


def _write(path: pathlib.Path, state: str, values: Sequence[np.ndarray]) -> None:
  """A line with the checksum of the rest; a line that describes the arrays; their bytes."""
  header = json.dumps(dict(state=state, arrays=[(value.dtype.str, value.shape) for value in values])).encode() + b"\n"
  blocks = [header, *(np.ascontiguousarray(value).data for value in values)]
  check = functools.reduce(lambda sum, block: zlib.crc32(block, sum), blocks, 0)
  with atomic.whole_file(path) as file:
    for block in (f"{check:08x}\n".encode(), *blocks):
      file.write(block)


def _read(path: pathlib.Path, state: str) -> tuple[np.ndarray, ...] | None:
  """The arrays of a file; None where it is missing, of another state, or damaged."""
  try:
    with path.open("rb") as file:
      status = os.fstat(file.fileno())
      check, header = file.readline(), file.readline()
      start = file.tell()
      content = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    described = json.loads(header)
    if described["state"] != state:
      return None
    identity = status.st_ino, status.st_size, status.st_mtime_ns
    if path not in _sound or _sound[path] != identity:  # Once, as it takes longer than reading.
      if int(check, 16) != zlib.crc32(memoryview(content)[len(check) :]):
        return None
      _sound[path] = identity
    values = []
    for dtype, shape in described["arrays"]:
      count = int(np.prod(shape))
      values.append(np.frombuffer(content, dtype, count, start).reshape(shape))
      start += values[-1].nbytes
    return tuple(values)
  except (OSError, ValueError, KeyError, TypeError):  # Nothing there, or no file of `_write`'s.
    return None


class Cached:
  """A source whose examples are decoded once; all that a loader asks of it is the same, bit for bit.

  Args:
    source: a `sources.base.Source`.
    cache: "memory", for as long as `source` lives, or "disk".
  """

  def __init__(self, source, cache: str):
    self._source, self._cache, self.pixels = source, cache, source.pixels

  def __len__(self) -> int:
    return len(self._source)

  def describe(self, index: int) -> str:
    """See the source, like all here."""
    return self._source.describe(index)

  def border(self, index: int) -> np.ndarray:
    """Kept by the source itself."""
    return self._source.border(index)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Raises what the source raises, and ConfigError where the cache folder cannot be made or trusted."""
    name, state = self._source.identity(index)
    if self._cache == "disk":
      return arrays("examples", name, state, lambda: self._source[index])
    kept = self._source.kept
    if index not in kept or kept[index][0] != state:
      kept[index] = state, self._source[index]
    return kept[index][1]


def check_room(cache: str, sources: Sequence) -> None:
  """Raises ConfigError, with the size needed, where the decoded examples of all `sources` do not fit.

  Args:
    cache: config.data.cache; "device" keeps examples of the evaluation in memory.
  """
  if cache == "none":
    return
  examples = [
    (source, index, source.pixels.bytes * h * w) for source in sources for index, (h, w) in enumerate(source.sizes)
  ]
  if cache == "disk":
    folder = user_cache.folder("examples")
    there = {path.name for path in folder.iterdir()}
    missing = {path_of("examples", source.identity(index)[0]).name: size for source, index, size in examples}
    needed = sum(size for name, size in missing.items() if name not in there)
    free, where = shutil.disk_usage(folder).free, f"are free in {folder}"
    remedy = (
      f"Free space there (rm -r {folder} removes what was decoded, for other data sets too), set XDG_CACHE_HOME to a"
      " folder with more, or set data.cache=none."
    )
  else:
    needed, free, where = sum(size for *_, size in examples), free_memory(), "of memory are free"
    remedy = "Set data.cache=disk or none."
  if needed > free:
    raise ConfigError(
      f"data.cache = {cache}: {len(examples)} decoded examples take {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB"
      f" {where}. {remedy}"
    )


def free_memory() -> int:
  """Free bytes of memory, of the machine or of its container, whichever has less."""
  meminfo, group = pathlib.Path("/proc/meminfo"), pathlib.Path("/sys/fs/cgroup")
  if not meminfo.exists():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
  limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
  return free if limit == "max" else min(free, int(limit) - int((group / "memory.current").read_text()))
