"""data.cache: the same batches bit for bit without decoding twice, whatever happens to the files that it keeps."""

import concurrent.futures
import functools
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from segjax import input_pipeline
from segjax.config import IGNORE_LABEL, ConfigError, default_config
from segjax.config.rules import validate
from segjax.files import atomic
from segjax.input_pipeline import cache, images, masks
from segjax.input_pipeline.bad_examples import BadExamples

LOADERS, CACHES = ("tf_data", "grain"), ("memory", "disk")


@pytest.fixture
def data(tmp_path, monkeypatch):
  """config.data of 7 images of several sizes, JPEG and PNG; the cache lies in tmp_path."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  rng = np.random.default_rng(0)
  for folder in ("images", "masks"):
    (tmp_path / "data" / folder / "train").mkdir(parents=True)
  for i in range(7):
    h, w = rng.integers(6, 20, 2)
    name = f"train/{i}.{'jpg' if i % 2 else 'png'}"
    Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(tmp_path / "data/images" / name)
    mask = np.kron(rng.integers(0, 3, (2, 2), dtype=np.uint8), np.ones((h, w), np.uint8))[:h, :w]
    Image.fromarray(mask).save(tmp_path / "data/masks/train" / f"{i}.png")
  data = default_config(data="folder").data
  data.update(dir=str(tmp_path / "data"), classes=("a", "b", "c"), workers=2, instances="components", loader="grain")
  return data


@pytest.fixture
def decoded(tmp_path, monkeypatch):
  """The paths of the files in tmp_path that were decoded; a thread that another test left may decode others."""
  paths = []

  def counted(read, path, **how):
    paths.extend([str(path)] * str(path).startswith(str(tmp_path)))
    return read(path, **how)

  for module, name in ((images, "read_image"), (masks, "read_mask")):
    monkeypatch.setattr(module, name, functools.partial(counted, getattr(module, name)))
  return paths


def batches(data, source=None, steps=(0, 7), **options):
  """Two epochs of seven steps of two."""
  source = source or input_pipeline.make_source(data, "train")
  return list(
    input_pipeline.train_batches(
      source, data, seed=3, batch_size=2, rows=np.arange(2), start_step=steps[0], num_steps=steps[1], **options
    )
  )


def assert_same(first, second):
  assert len(first) == len(second) > 0
  for a, b in zip(first, second):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_the_same_bit_for_bit_and_the_second_epoch_decodes_nothing(data, decoded, loader, kind):
  data.loader = loader
  want = batches(data, border=True)
  data.cache = kind
  source = input_pipeline.make_source(data, "train")
  assert_same(want, batches(data, source, border=True))
  assert {os.path.basename(path).partition(".")[0] for path in decoded} == set("0123456")
  decoded.clear()
  assert_same(want[3:], batches(data, source, (3, 7), border=True))
  assert not decoded
  again = input_pipeline.make_source(data, "train")  # As another run has it.
  assert_same(want, batches(data, again, border=True))
  assert bool(decoded) == (kind == "memory")


@pytest.mark.parametrize("kind", CACHES)
def test_a_file_that_changed_is_read_again_and_one_that_went_is_missed(data, kind):
  data.cache = kind
  source = input_pipeline.make_source(data, "train")
  batches(data, source)
  path = f"{data.dir}/images/train/2.png"
  pixels = np.asarray(Image.open(path))
  Image.fromarray(255 - pixels).save(path)
  data.cache = "none"
  want = batches(data)
  data.cache = kind
  assert_same(want, batches(data, source))
  os.remove(path)
  with pytest.raises(images.DataError, match=r"2\.png: cannot be read .* Restore it"):
    batches(data, source)


def test_masks_of_another_meaning_or_read_by_other_code_are_made_again(data, decoded, monkeypatch):
  data.cache = "disk"
  batches(data)
  data.label_map = "0:255"
  assert all((batch["label"] != 0).all() for batch in batches(data))
  decoded.clear()
  monkeypatch.setattr(cache, "code_state", lambda: "newer")
  batches(data)
  assert len(decoded) >= 14


def flip_last_byte(path):
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)


DAMAGES = {
  "cut short": lambda path: os.truncate(path, path.stat().st_size - 5),
  "empty": lambda path: os.truncate(path, 0),
  "a byte": flip_last_byte,
  "the header": lambda path: path.write_bytes(path.read_bytes().replace(b"|u1", b"|O", 1)),
  "all": lambda path: path.write_bytes(os.urandom(200)),
  "unreadable lines": lambda path: path.write_bytes(b"zz\n[]\n" * 20),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_of_the_cache_is_made_again(data, decoded, tmp_path, damage):
  want = batches(data)
  data.cache = "disk"
  batches(data)
  batches(data)  # All check sums have been compared; that must not make it blind.
  for path in (tmp_path / "cache/segjax/examples").iterdir():
    damage(path)
  decoded.clear()
  assert_same(want, batches(data))
  assert len(set(decoded)) == 14
  decoded.clear()
  assert_same(want, batches(data))
  assert not decoded


def test_many_threads_may_make_the_same_file(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  value = np.arange(50_000, dtype=np.float16).reshape(100, 500)
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    found = list(pool.map(lambda n: cache.arrays("x", f"name {n % 2}", "state", lambda: (value, value[0])), range(64)))
  for whole, row in found:
    np.testing.assert_array_equal(whole, value)
    np.testing.assert_array_equal(row, value[0])
  assert len(list((tmp_path / "segjax/x").iterdir())) == 2


def test_too_little_room_is_told_before_anything_is_decoded(data, monkeypatch):
  source = input_pipeline.make_source(data, "train")
  needed = sum(4 * h * w for h, w in source.sizes)
  monkeypatch.setattr(cache, "free_memory", lambda: needed)
  cache.check_room("memory", [source])
  with pytest.raises(ConfigError, match=r"data.cache = memory: 14 decoded examples take .*Set data.cache=disk or none"):
    cache.check_room("memory", [source, source])
  usage = shutil.disk_usage(data.dir)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
  with pytest.raises(ConfigError, match=r"GB are free in .*/segjax/examples. Free space there .*data.cache=none"):
    cache.check_room("disk", [source])
  data.cache = "disk"
  batches(data)
  cache.check_room("disk", [source])  # Nothing is left to write.
  cache.check_room("none", [source, source])


def test_free_memory_is_less_than_the_machine_has():
  assert 0 < cache.free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_disk_that_fills_up_in_mid_run_is_told_once_and_the_run_goes_on(data, monkeypatch, capsys):
  want = batches(data)
  data.cache = "disk"

  def full(path):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(atomic, "whole_file", full)
  assert_same(want, batches(data))
  assert capsys.readouterr().out.count("No space left on device") == 1


@pytest.mark.parametrize("kind", CACHES)
def test_an_example_that_cannot_be_read_is_not_kept(data, tmp_path, kind):
  data.cache = kind
  path = f"{data.dir}/masks/train/4.png"
  source, whole = input_pipeline.make_source(data, "train"), open(path, "rb").read()
  _ = source.sizes
  open(path, "wb").write(b"rotten")
  (tmp_path / "run").mkdir()
  found = batches(data, source, bad=BadExamples(tmp_path / "run", most=1))
  rows = [(batch["label"][row] == IGNORE_LABEL).all() for batch in found for row in np.flatnonzero(batch["id"] == 4)]
  assert rows and all(rows)
  open(path, "wb").write(whole)
  for batch in batches(data, source):
    assert (batch["label"] != IGNORE_LABEL).any((1, 2)).all()


def test_generated_examples_have_nothing_to_keep():
  config = default_config(data="synthetic")
  config.data.cache = "memory"
  with pytest.raises(ConfigError, match="data.cache = 'memory': keeps decoded files, and this source has none"):
    validate(config)
