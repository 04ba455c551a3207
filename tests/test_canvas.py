"""Images of very different sizes: cut for training without another distribution of crops, grouped for evaluation."""

import functools

import jax
import numpy as np
import pytest
from PIL import Image

from segjax import augment, evaluate, input_pipeline, train
from segjax.config import IGNORE_LABEL, default_config
from segjax.input_pipeline import canvas
from segjax.run import prediction_info
from segjax.tools import dry_run
from tests.marks import full

STILL = {}
BENT = dict(rotation=20.0, shift=0.1, shear=8.0, zoom=0.2, elastic=1.5)


@functools.cache
def compiled(crop, margin, **options):
  options = augment.Augmentation(**options)
  return jax.jit(
    functools.partial(
      augment.augment_batch,
      options=options,
      crop_size=crop,
      margin=margin,
      fill=(1, 2, 3),
      ignore_label=255,
      num_classes=9,
    )
  )


def augmented(batch, draws, crop, margin=0, outside="void", scale=(0.5, 2.0), warp=STILL, cut=True):
  """The crops of a batch on its canvas."""
  batch = {name: value for name, value in batch.items() if cut or name not in ("origin", "share")}
  return compiled(crop, margin, scale=scale, outside=outside, **warp)(jax.random.key(draws), batch)


@pytest.mark.parametrize("margin, outside, warp", [(3, "mirror", BENT), *full((0, "void", STILL), (7, "void", STILL))])
def test_a_crop_of_the_window_is_the_crop_of_the_whole_image_bit_for_bit(margin, outside, warp):
  """At any scale and place: all that a crop looks at lies in what the host cuts out."""
  rng, crop, scale, size = np.random.default_rng(0), (10, 14), (0.5, 2.0), (150, 260)
  if warp is BENT:
    size = (400, 500)
  window, around = augment.crop_window(crop, margin, augment.Augmentation(scale=scale, outside=outside, **warp))
  assert window[0] < size[0] and window[1] < size[1]
  image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
  whole = dict(
    image=image,
    label=image[..., 0] % 5,
    border=image[..., 1].astype(np.float16),
    size=np.array(size, np.int32),
    id=np.array(0, np.int32),
  )
  for step in range(4):
    examples = [canvas.cut_window(whole, window, around, (0, step, row)) for row in range(24)]
    cut = canvas.pad_batch(examples, window)
    uncut = [whole | dict(origin=np.zeros(2, np.int32), share=example["share"]) for example in examples]
    options = dict(crop=crop, margin=margin, outside=outside, scale=scale, warp=warp)
    for a, b in zip(augmented(cut, step, **options), augmented(canvas.pad_batch(uncut, size), step, **options)):
      np.testing.assert_array_equal(a, b)


def test_the_hosts_share_places_crops_as_evenly_as_the_devices_own_draw():
  """Of all places of 8 in 61 pixels at scale 1, each is as likely, first and last too."""
  window, around = augment.crop_window((8, 8), 0, augment.Augmentation(scale=(1.0, 1.0)))
  image = np.tile(np.arange(61, dtype=np.uint8)[:, None, None], (1, 61, 3))
  whole = dict(image=image, label=image[..., 0], border=image[..., 0], size=np.full(2, 61, np.int32))
  draws = [canvas.cut_window(whole, window, around, (5, step, row)) for step in range(40) for row in range(50)]
  batch = canvas.pad_batch(draws, window)
  _, label, _ = augmented(batch, 0, (8, 8), scale=(1.0, 1.0))
  counts = np.bincount(np.asarray(label)[:, 0, 0], minlength=54)
  assert len(counts) == 54
  expected = 2000 / 54
  assert ((counts - expected) ** 2 / expected).sum() < 90  # Chi-squared of 53 degrees: beyond 90 in one of 900.


def test_sides_that_fit_are_drawn_by_the_device_as_ever():
  window, around = augment.crop_window((8, 8), 0, augment.Augmentation(scale=(0.5, 2.0)))
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
  small = dict(image=image, label=image[..., 0], border=image[..., 1], size=np.array([20, 24], np.int32))
  batch = canvas.pad_batch([canvas.cut_window(small, window, around, (0, 0, row)) for row in range(16)], window)
  assert (batch["share"] == -1).all() and not batch["origin"].any()
  for a, b in zip(augmented(batch, 1, (8, 8)), augmented(batch, 1, (8, 8), cut=False)):
    np.testing.assert_array_equal(a, b)


def folder_of(root, sizes, split="train"):
  """config.data of a folder with an image of each size."""
  rng = np.random.default_rng(0)
  for i, (h, w) in enumerate(sizes):
    for folder, shape in (("images", (h, w, 3)), ("masks", (h, w))):
      (root / folder / split).mkdir(parents=True, exist_ok=True)
      values = rng.integers(0, 256 if folder == "images" else 2, shape, dtype=np.uint8)
      Image.fromarray(values).save(root / folder / split / f"{i:02d}.png")
  data = default_config(data="folder").data
  data.update(dir=str(root), classes=("a", "b"), loader="grain", workers=1)
  return data


ONE_HUGE = [(20, 24)] * 7 + [(300, 400)]


def batches(data, rows, start=0, window=((60, 70), (6, 6))):
  source = input_pipeline.make_source(data, "train")
  return list(
    input_pipeline.train_batches(
      source, data, seed=1, batch_size=4, rows=np.array(rows), start_step=start, num_steps=4, window=window
    )
  )


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_one_huge_image_among_small_ones_is_cut_the_same_on_any_host_and_after_a_resume(tmp_path, loader):
  data = folder_of(tmp_path, ONE_HUGE)
  data.loader = loader
  whole = batches(data, range(4))
  assert whole[0]["image"].shape == (4, 60, 70, 3)
  cut = [(b["size"][row], b["origin"][row], b["share"][row]) for b in whole for row in range(4) if b["id"][row] == 7]
  assert len(cut) == 2 and all(size.tolist() == [300, 400] and (share >= 0).all() for size, _, share in cut)
  assert (cut[0][1] != cut[1][1]).all()  # Each time elsewhere.
  source = input_pipeline.make_source(data, "train")
  for batch in whole:
    for row, index in enumerate(batch["id"]):
      y, x = batch["origin"][row]
      pixels = source[index][0][y : y + 60, x : x + 70]
      np.testing.assert_array_equal(batch["image"][row, : pixels.shape[0], : pixels.shape[1]], pixels)
  parts = [batches(data, rows) for rows in ((0, 1), (2, 3))]
  for got, want in ((batches(data, range(4), start=2), whole[2:]), (zip(*parts), whole)):
    for a, b in zip(got, want):
      for name in b:
        value = np.concatenate([part[name] for part in a]) if isinstance(a, tuple) else a[name]
        np.testing.assert_array_equal(value, b[name])


def test_images_are_whole_where_the_canvas_is_not_mostly_padding_or_is_named(tmp_path):
  data = folder_of(tmp_path / "even", [(20, 24)] * 7 + [(28, 32)])
  assert batches(data, range(4), window=((8, 8), (2, 2)))[0].keys() == {"image", "label", "size", "id"}
  data = folder_of(tmp_path / "huge", ONE_HUGE)
  data.canvas_size = (300, 400)
  batch = batches(data, range(4))[0]
  assert batch["image"].shape == (4, 300, 400, 3) and "origin" not in batch
  source = input_pipeline.make_source(data, "train")
  assert input_pipeline.eval_canvases(source, data) == [(300, 400)]


def test_the_start_says_how_much_is_padding_and_what_is_done(tmp_path):
  data = folder_of(tmp_path, ONE_HUGE)
  source = input_pipeline.make_source(data, "train")
  first, cut, grouped = input_pipeline.describe_canvases(source, source, data, ((60, 70), (6, 6)), 8)
  assert first == "canvas: in training 60x70, 78 % of it padding (0.1 MiB a batch)"
  assert "a canvas of 300x400, 87 % of it padding (3.7 MiB a batch): data.canvas_size=300,400" in cut
  assert "so there are 2: 20x24, 300x400." in grouped
  data.canvas_size = (300, 400)
  first, note = input_pipeline.describe_canvases(source, source, data, ((60, 70), (6, 6)), 8)
  assert "in evaluation 300x400, 87 % of it padding" in first and "data.canvas_size=0,0 cuts larger images" in note


def test_groups_are_one_unless_mostly_padding_and_each_image_has_one():
  assert canvas.groups([(375, 500)] * 9 + [(500, 375)] * 2) == [(500, 500)]
  assert canvas.groups(ONE_HUGE) == [(20, 24), (300, 400)]
  rng = np.random.default_rng(0)
  sizes = [tuple(size) for size in np.exp(rng.uniform(3, 8, (500, 2))).astype(int).tolist()]
  found = canvas.groups(sizes)
  place = np.argmax([(np.array(sizes) <= size).all(1) for size in found], axis=0)
  assert 2 < len(found) <= 9 and found[-1] == tuple(np.max(sizes, axis=0))
  used = np.array(found).prod(1)[place]
  assert set(place) == set(range(len(found))) and used.sum() < 0.5 * len(sizes) * np.prod(found[-1])


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_an_evaluation_shows_each_image_whole_and_once_large_ones_in_small_batches(tmp_path, loader):
  data = folder_of(tmp_path, [(300, 400), *ONE_HUGE[:-1], (310, 390)], "val")
  data.loader = loader
  source = input_pipeline.make_source(data, "val")
  found = list(input_pipeline.eval_batches(source, data, batch_size=4, rows=np.arange(4), single=(1, np.arange(1))))
  assert [(b["image"].shape[:3], b["id"].tolist()) for b in found] == [
    ((4, 20, 24), [1, 2, 3, 4]),
    ((4, 20, 24), [5, 6, 7, -1]),
    ((1, 310, 400), [0]),
    ((1, 310, 400), [8]),
  ]
  for batch in found:
    for row, index in enumerate(batch["id"]):
      h, w = batch["size"][row]
      if index >= 0:
        np.testing.assert_array_equal(batch["image"][row, :h, :w], source[index][0])
      label = batch["label"][row].copy()
      label[:h, :w] = IGNORE_LABEL
      assert (label == IGNORE_LABEL).all()


@pytest.mark.full
def test_a_run_with_one_huge_image_trains_on_its_windows_and_scores_every_pixel(tmp_path, capsys):
  for split in ("train", "val"):
    data = folder_of(tmp_path / "data", ONE_HUGE, split)
  config = default_config(model="unet", data="folder")
  config.data.update(data)
  config.update(num_steps=2, batch_size=8, crop_size=(8, 8))
  config.model.update(width=2, depth=1)
  scores = train.train(config, tmp_path / "run")
  out = capsys.readouterr().out
  assert "canvas: in training 30x30, " in out and "data.canvas_size=300,400" in out and "2: 20x24, 300x400" in out
  assert np.isfinite(scores["val/mean_iou"])
  assert prediction_info.load(tmp_path / "run").canvas_size == (20, 24)
  assert evaluate.evaluate(config, tmp_path / "run") == scores
  config.eval.batch_size = 16
  assert evaluate.evaluate(config, tmp_path / "run") == scores
  dry_run.dry_run(config)
  assert "larger images are cut to a canvas of" in capsys.readouterr().out
