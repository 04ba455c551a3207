"""Both loaders, one interface: the same batches bit for bit, from any step, and errors that arrive with their file."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segjax import input_pipeline
from segjax.config import IGNORE_LABEL, default_config
from segjax.input_pipeline import DataError, order
from tests.marks import full

LOADERS = ["tf_data", "grain"]


@pytest.fixture(params=["synthetic", "folder"])
def data(request, tmp_path):
  """config.data of both kinds of source; the folder's images have several sizes, JPEG and PNG."""
  config = default_config(data=request.param).data
  config.workers = 2
  if request.param == "synthetic":
    config.num_train, config.num_val, config.image_size = 11, 5, (12, 10)
    return config
  rng = np.random.default_rng(0)
  for split, count in (("train", 11), ("val", 5)):
    for folder in ("images", "masks"):
      (tmp_path / folder / split).mkdir(parents=True)
    for i in range(count):
      h, w = rng.integers(6, 20, 2)
      pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(tmp_path / "images" / split / f"{i}.{'jpg' if i % 2 else 'png'}")
      Image.fromarray(rng.integers(0, 3, (h, w), dtype=np.uint8)).save(tmp_path / "masks" / split / f"{i}.png")
  config.dir, config.classes = str(tmp_path), ("a", "b", "c")
  return config


def train(data, loader, start=0, rows=None, steps=6, batch_size=4):
  data.loader = loader
  source = input_pipeline.make_source(data, "train")
  rows = np.arange(batch_size) if rows is None else rows
  return list(
    input_pipeline.train_batches(
      source, data, seed=3, batch_size=batch_size, rows=rows, start_step=start, num_steps=steps
    )
  )


def assert_same(first, second):
  assert len(first) == len(second) > 0
  for a, b in zip(first, second):
    assert a.keys() == b.keys() == {"image", "label", "size", "id"}
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


def test_both_loaders_give_the_same_batches(data):
  batches = train(data, "tf_data")
  assert_same(batches, train(data, "grain"))
  for step, batch in enumerate(batches):
    np.testing.assert_array_equal(batch["id"], order.train_ids(3, step, 4, 11))


def test_batches_are_the_sources_examples_padded_at_the_bottom_and_right(data):
  source = input_pipeline.make_source(data, "train")
  for batch in train(data, "grain", steps=2):
    for image, label, (h, w), index in zip(batch["image"], batch["label"], batch["size"], batch["id"]):
      pixels, classes = source[index]
      assert (h, w) == classes.shape and image.shape[:2] == source.canvas_size
      np.testing.assert_array_equal(image[:h, :w], pixels)
      np.testing.assert_array_equal(label[:h, :w], classes)
      assert (label[h:] == IGNORE_LABEL).all() and (label[:, w:] == IGNORE_LABEL).all() and (image[h:] == 0).all()


@pytest.mark.parametrize("loader", LOADERS)
def test_starting_late_continues_where_an_earlier_run_stopped(data, loader):
  assert_same(train(data, loader)[4:], train(data, loader, start=4))


@pytest.mark.parametrize("loader", LOADERS)
def test_hosts_load_disjoint_rows_of_the_same_global_batch(data, loader):
  whole = train(data, loader)
  parts = [train(data, loader, rows=rows) for rows in (np.array([0, 1]), np.array([2, 3]))]
  together = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts)]
  assert_same(whole, together)


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_pads_with_void(data, loader):
  data.loader = loader
  source = input_pipeline.make_source(data, "val")
  batches = list(input_pipeline.eval_batches(source, data, batch_size=4, rows=np.arange(4)))
  assert [b["id"].tolist() for b in batches] == [[0, 1, 2, 3], [4, -1, -1, -1]]
  assert (batches[1]["label"][1:] == IGNORE_LABEL).all() and (batches[1]["size"][1:] == 0).all()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_that_rots_in_mid_run_is_named(tmp_path, loader):
  for i, folder in itertools.product(range(6), ("images/train", "masks/train")):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8) if "mask" in folder else (8, 8, 3), np.uint8)).save(tmp_path / folder / f"{i}.png")
  data = default_config(data="folder").data
  data.dir, data.classes, data.loader = str(tmp_path), ("a", "b"), loader
  source = input_pipeline.make_source(data, "train")
  assert source.canvas_size == (8, 8)  # All headers were sound at start-up.
  (tmp_path / "images/train/3.png").write_bytes(b"\x89PNG\r\n\x1a\nrotten")
  batches = input_pipeline.train_batches(
    source, data, seed=0, batch_size=2, rows=np.arange(2), start_step=0, num_steps=3
  )
  with pytest.raises(DataError, match=r"3\.png: (damaged|not a readable)"):
    list(batches)


def test_canvas_option_pads_further_and_refuses_larger_images(data):
  data.canvas_size = (40, 48)
  assert train(data, "grain", steps=1)[0]["image"].shape == (4, 40, 48, 3)
  data.canvas_size = (8, 8)
  with pytest.raises(DataError, match=r"data.canvas_size = \(8, 8\) is smaller than the largest image"):
    train(data, "grain", steps=1)


@pytest.mark.parametrize("loader", [*full("tf_data"), "grain_loader"])
def test_a_program_that_fails_between_batches_ends(loader):
  """In a process that can be killed: TensorFlow waited at Python's end for threads that were no more."""
  code = f"""
import time, numpy as np
from segjax.input_pipeline import {loader} as loader
def load(position):
  time.sleep(0.05)
  return dict(image=np.zeros((4, 4, 3), np.uint8), label=np.zeros((4, 4), np.uint8), size=np.array([4, 4], np.int32),
              id=np.array(position, np.int32))
for _ in range(2):
  batches = loader.batches(range(10**6), load, (4, 4), 4, 3)
  print(next(batches)["id"].tolist())
raise SystemExit(3)
"""
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert run.returncode == 3 and run.stdout == "[0, 1, 2, 3]\n" * 2, run.stderr
