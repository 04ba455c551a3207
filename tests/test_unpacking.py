"""Archives that lie: refused before they fill the disk or write elsewhere."""

import io
import pathlib
import shutil
import tarfile
import types
import zipfile

import pytest

from segjax.input_pipeline import DataError
from segjax.tools import prepare, unpacking


def tar(path, name, size, sparse=False, content=b""):
  """A tar of one member, which claims `size` bytes."""
  info = tarfile.TarInfo(name)
  info.size = size
  if sparse:  # GNU's format 1.0 holds the map of the data in front of it: none.
    info.pax_headers = {
      "GNU.sparse.major": "1",
      "GNU.sparse.minor": "0",
      "GNU.sparse.name": name,
      "GNU.sparse.realsize": str(size),
    }
    content, info.size = b"0\n".ljust(512, b"\0"), 512
  header = info.tobuf(tarfile.PAX_FORMAT)
  path.write_bytes(header + content.ljust(512, b"\0") + bytes(1024))


def test_a_sparse_tar_of_a_terabyte_is_refused_before_anything_is_written(tmp_path):
  tar(tmp_path / "a.tar", "VOC2012/a.jpg", 10**12, sparse=True)
  assert (tmp_path / "a.tar").stat().st_size < 5000
  with tarfile.open(tmp_path / "a.tar") as archive:
    assert archive.getmembers()[0].size == 10**12
  with pytest.raises(DataError, match="VOC2012/a.jpg is a sparse file"):
    unpacking.untar(tmp_path / "a.tar", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_more_than_the_disk_has_free_is_refused_before_anything_is_written(tmp_path, monkeypatch):
  with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("small", b"x")
    archive.writestr("zeros", bytes(10**6))
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
  with pytest.raises(DataError, match="claims to unpack to 1,000,001 bytes, and .* has 1,000,000 free"):
    unpacking.unzip(tmp_path / "a.zip", tmp_path / "out")
  assert not any((tmp_path / "out").iterdir())
  (tmp_path / "out/small").write_bytes(b"x")  # What is there already needs no room.
  unpacking.unzip(tmp_path / "a.zip", tmp_path / "out")
  assert (tmp_path / "out/zeros").stat().st_size == 10**6


@pytest.mark.parametrize("name", ["../x", "/tmp/segjax_x", "a/../../x", "link/x"])
def test_names_that_point_elsewhere_are_refused_before_anything_is_written(name, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out/link").symlink_to(tmp_path)
  for path, unpack in ((tmp_path / "a.zip", unpacking.unzip), (tmp_path / "a.tar", unpacking.untar)):
    if path.suffix == ".zip":
      with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("first", b"x")
        archive.writestr(name, b"x")
    else:
      with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("first"))
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(DataError, match="points outside of"):
      unpack(path, tmp_path / "out")
  assert [path.name for path in (tmp_path / "out").iterdir()] == ["link"] and not (tmp_path / "x").exists()
  assert not pathlib.Path("/tmp/segjax_x").exists()


def test_encrypted_and_unknown_zips_are_named_without_a_traceback(tmp_path):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("a.png", b"x" * 100)
  plain = buffer.getvalue()
  for flag, method, message in (
    (1, 0, "a.png is encrypted. Unpack the archive by hand"),
    (0, 9, "damaged .That compression method is not supported"),
  ):
    data = bytearray(plain)
    for start, offset in ((plain.index(b"PK\3\4"), 6), (plain.index(b"PK\1\2"), 8)):
      data[start + offset : start + offset + 4] = bytes([flag, 0, method, 0])
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(DataError, match=message):
      unpacking.unzip(tmp_path / "a.zip", tmp_path / "out")


def test_a_mask_that_claims_gigabytes_is_not_read_into_memory(tmp_path):
  with tarfile.open(tmp_path / "benchmark.tgz", "w:gz") as archive:
    info = tarfile.TarInfo("benchmark_RELEASE/dataset/cls/2008_000002.mat")
    info.size = prepare._LARGEST_MASK + 1
    archive.fileobj.write(info.tobuf())
  with pytest.raises(DataError, match="claims 67,108,865 bytes, which no mask has"):
    list(prepare._sbd_masks(tmp_path / "benchmark.tgz"))
