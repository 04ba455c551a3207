"""What a run remembers of the examples that it began with."""

import json
import os
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from segjax.config import ConfigError, default_config
from segjax.input_pipeline import DataError
from segjax.run import examples
from segjax.run.examples import check_examples
from tests.test_folder import MASK, make, source, write


@pytest.fixture
def data(tmp_path):
  for split in ("train", "val"):
    make(tmp_path / "data", split=split)
  return tmp_path / "data"


def start(data, tmp_path, most_bad=0, bad_names=(), border=0.0, **options):
  """What a start of a run does."""
  config = default_config(data="folder")
  config.loss.border_weight = border
  sources = {split: source(data, split, **options) for split in ("train", "val")}
  check_examples(config, sources, tmp_path, types.SimpleNamespace(most=most_bad, names=bad_names))


def rewrite(path, keep_time=False):
  """Another content of the same size."""
  content, time = bytearray(path.read_bytes()), path.stat().st_mtime_ns
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  os.utime(path, ns=(time, time) if keep_time else (time, time + 10**9))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_file_that_changed_since_is_refused_by_name(data, tmp_path, split, folder):
  start(data, tmp_path)
  start(data, tmp_path)
  path = next((data / folder / split).iterdir())
  kept = path.read_bytes()
  rewrite(path)
  message = rf"The examples of '{split}' are not those .*changed {path}. Restore them, or give another --workdir"
  with pytest.raises(ConfigError, match=message):
    start(data, tmp_path)
  path.write_bytes(kept)  # Restored, at another time.
  start(data, tmp_path)
  write(path.with_suffix(".png"), np.zeros((60, 80, 3), np.uint8)) if folder == "masks" else path.write_bytes(kept * 2)
  with pytest.raises(ConfigError, match=f"changed {path}"):
    start(data, tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_names_that_come_or_go_are_refused_in_training_and_validation(data, tmp_path, split):
  start(data, tmp_path)
  make(data, names=("new",), split=split)
  with pytest.raises(ConfigError, match=f"examples of '{split}' .*: new images/{split}/new"):
    start(data, tmp_path)


def test_a_copy_with_other_times_goes_on_and_only_files_of_other_times_are_read(data, tmp_path, monkeypatch):
  start(data, tmp_path)
  shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
  start(tmp_path / "copy", tmp_path)
  read = []
  checksum = examples._checksum
  monkeypatch.setattr(examples, "_checksum", lambda path: read.append(path) or checksum(path))
  os.utime(data / "images/val/a.jpg", (1, 1))
  start(data, tmp_path)
  assert read == [data / "images/val/a.jpg"]
  (tmp_path / "copy/masks/val/b.png").write_bytes((data / "masks/val/b.png").read_bytes()[:-1] + b"!")
  with pytest.raises(ConfigError, match="changed .*copy/masks/val/b.png"):
    start(tmp_path / "copy", tmp_path)


@pytest.mark.parametrize("place", [0, 2**16 + 5, -1])
def test_a_checksum_is_of_both_ends_of_a_large_file_and_of_all_of_a_small_one(tmp_path, place):
  for size, all_seen in ((2**17, True), (2**18, False)):
    content = bytearray(size)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    differ = examples._checksum(tmp_path / "a") != examples._checksum(tmp_path / "b")
    assert differ == (all_seen or place in (0, -1))


def test_examples_that_may_be_bad_may_change(data, tmp_path):
  start(data, tmp_path)
  path = data / "images/train/a.jpg"
  path.write_bytes(path.read_bytes()[:-100])
  start(data, tmp_path, most_bad=1)  # It cannot be read: one of the bad ones.
  with pytest.raises(ConfigError, match="changed .*a.jpg"):
    start(data, tmp_path)
  Image.new("RGB", (8, 6)).save(path)
  with pytest.raises(ConfigError, match="changed .*a.jpg"):
    start(data, tmp_path, most_bad=1)
  start(data, tmp_path, most_bad=1, bad_names=["images/train/a"])  # Was bad, and is replaced.


def test_masks_of_instances_and_classes_belong_to_what_a_run_began_with(data, tmp_path):
  (data / "classes.txt").write_text("ground\nroad\ncar\n")
  for name in ("a", "b"):
    write(data / "instances" / f"{name}.png", MASK % 3)
  options = dict(classes=(), instances="instances", border=1.0)
  start(data, tmp_path, **options)
  rewrite(data / "instances/a.png")
  with pytest.raises(ConfigError, match="changed .*instances/a.png"):
    start(data, tmp_path, **options)
  rewrite(data / "instances/a.png")
  (data / "classes.txt").write_text("ground\ncar\nroad\n")
  with pytest.raises(ConfigError, match=r"classes \['ground', 'road', 'car'\] -> \['ground', 'car', 'road'\]"):
    start(data, tmp_path, **options)


def test_a_damaged_record_and_a_file_that_went_are_named(data, tmp_path):
  sources = {"train": source(data)}
  (data / "images/train/a.jpg").unlink()
  config, bad = default_config(data="folder"), types.SimpleNamespace(most=0, names=())
  with pytest.raises(DataError, match="a.jpg: cannot be read"):
    check_examples(config, sources, tmp_path, bad)
  assert not list(tmp_path.glob("examples_*"))
  names = ["images/train/a", "images/train/b"]
  for text in ("{", "[]", json.dumps(dict(names=names, classes=["ground", "road", "car"]))):
    (tmp_path / "examples_train.json").write_text(text)
    with pytest.raises(ConfigError, match="examples_train.json: damaged"):
      check_examples(config, sources, tmp_path, bad)
