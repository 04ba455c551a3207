"""Unpacks archives without trusting them: their names and sizes are checked, and that they are complete."""

import contextlib
import functools
import gzip
import lzma
import pathlib
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import tqdm

from segjax.files import atomic
from segjax.input_pipeline.images import DataError

# What damaged archives raise, and those packed as Python cannot unpack.
DAMAGE = (
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
  gzip.BadGzipFile,
  EOFError,
  NotImplementedError,
)


@contextlib.contextmanager
def open_tar(path: pathlib.Path, mode: str = "r"):
  """`tarfile.open`, whose errors, and those of reading in the block, become a DataError."""
  try:
    with tarfile.open(path, mode) as archive:
      yield archive
  except (*DAMAGE, OSError) as error:
    raise DataError(f"{path}: damaged or not complete ({error}). Download it again.") from error


def members_of(path: pathlib.Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
  """Its members, in their order.

  Raises:
    DataError: a sparse file.
  """
  for member in archive:
    if member.issparse():  # A few bytes may claim a terabyte.
      raise DataError(
        f"{path}: {member.name} is a sparse file, which the official archive has none of. Download it again."
      )
    yield member


def untar(path: pathlib.Path, out: pathlib.Path) -> None:
  """Unpacks the plain files of a tar; see `extract`.

  Raises:
    DataError: what `extract` raises, a sparse file, or a damaged archive.
  """
  with open_tar(path) as archive:
    members = [member for member in members_of(path, archive) if member.isfile()]
    extract(path, [(m.name, m.size, functools.partial(archive.extractfile, m)) for m in members], out)


def unzip(path: pathlib.Path, out: pathlib.Path) -> None:
  """Unpacks a zip; see `extract`.

  Raises:
    DataError: what `extract` raises, an encrypted file, or a damaged archive.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      members = [info for info in archive.infolist() if not info.is_dir()]
      if locked := [info.filename for info in members if info.flag_bits & 1]:
        raise DataError(f"{path}: {locked[0]} is encrypted. Unpack the archive by hand, or download the official one.")
      extract(path, [(m.filename, m.file_size, functools.partial(archive.open, m)) for m in members], out)
  except DAMAGE as error:
    raise DataError(f"{path}: damaged or not complete ({error}). Download it again.") from error


def extract(archive: pathlib.Path, files: list[tuple[str, int, Callable[[], BinaryIO]]], out: pathlib.Path) -> None:
  """Writes (name, size, function that opens it) below `out`; a file of that size that is there already stays.

  Raises:
    DataError: before anything is written, names that point elsewhere, or more than the disk has room for; a damaged
      file; or `out` cannot be written.
  """
  with writing(out):
    out.mkdir(parents=True, exist_ok=True)
    for name, _, _ in files:
      if not (out / name).resolve().is_relative_to(out.resolve()):
        raise DataError(f"{archive} holds {name!r}, which points outside of {out}. Download it again.")
    missing = [file for file in files if not ((path := out / file[0]).is_file() and path.stat().st_size == file[1])]
    needed, free = sum(size for _, size, _ in missing), shutil.disk_usage(out).free
    if needed > free:
      raise DataError(
        f"{archive} claims to unpack to {needed:,} bytes, and {out} has {free:,} free. Free the space or give another"
        " --out; or download the archive again, if that is more than it should hold."
      )
    for name, _, read in tqdm.tqdm(missing, archive.name, unit=" files"):
      path = out / name
      path.parent.mkdir(parents=True, exist_ok=True)
      try:
        with read() as content, atomic.whole_file(path) as file:
          shutil.copyfileobj(content, file)
      except DAMAGE as error:
        raise DataError(f"{archive}: {name} is damaged ({error}). Download the archive again.") from error


@contextlib.contextmanager
def writing(folder: pathlib.Path):
  """Turns the system's errors while writing below `folder` into a DataError."""
  try:
    yield
  except OSError as error:
    raise DataError(f"{folder} cannot be written ({error}). Make it writable, or give another folder.") from error
