"""Nuclei and membranes: from the layouts of the Data Science Bowl and of ISBI 2012 to scored U-Nets, and what may be wrong."""

import importlib
import io
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from benchmarks.rand_error import rand_error
from segjax import config as config_lib
from segjax import evaluate as evaluate_lib
from segjax import input_pipeline
from segjax import train as train_lib
from segjax.config import ConfigError
from segjax.input_pipeline import DataError
from segjax.tools import check_data, prepare
from tests import command

SIZES = ((64, 64), (64, 80), (130, 174))  # (H, W) of the Bowl's images, as if 4 pixels were 1.
ISBI_NAMES = (0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19, 21, 22, 24, 25, 27, 28)  # 20 of the 30.


def touching_discs(size, seed):
  """[H, W] instances 1, 2, ...: in pairs without ground between them."""
  rng, (y, x), instances = np.random.default_rng(seed), np.mgrid[: size[0], : size[1]], np.zeros(size, np.uint16)
  for row in range(12, size[0] - 11, 24):
    for col in range(16, size[1] - 15, 32):
      radius = rng.uniform(5, 8)
      for side in (-1, 1):
        disc = (y - row) ** 2 + (x - col - side * radius * 0.8) ** 2 < radius**2
        instances[disc & (instances == 0)] = instances.max() + 1
  return instances


def photo(foreground, seed):
  """[H, W, 3] uint8, brighter where the foreground is."""
  grey = 50 + 120 * ndimage.gaussian_filter(foreground.astype(float), 0.7)
  return (grey[..., None] + np.random.default_rng(seed).normal(0, 12, (*foreground.shape, 3))).clip(0, 255).astype("u1")


def png(array):
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG")
  return file.getvalue()


def nucleus_ids(count):
  return [f"{7919 * i:08x}" for i in range(1, count + 1)]


def instances_of(number):
  return touching_discs(SIZES[number % 3], number)


def make_stage1(path, count):
  """stage1_train.zip: ID/images/ID.png with an alpha channel, and ID/masks/*.png, one nucleus each, in no order."""
  with zipfile.ZipFile(path, "w") as archive:
    for number, name in enumerate(nucleus_ids(count)):
      instances = instances_of(number)
      rgba = np.concatenate([photo(instances > 0, number), np.full((*instances.shape, 1), 255, np.uint8)], -1)
      archive.writestr(f"{name}/images/{name}.png", png(rgba))
      for n in range(1, instances.max() + 1):
        archive.writestr(f"{name}/masks/{(n * 2654435761) % 2**32:08x}.png", png((instances == n).astype("u1") * 255))


@pytest.fixture(scope="module")
def bowl(tmp_path_factory):
  """The folder that `python -m segjax.prepare nuclei` makes of stage1_train.zip."""
  root = tmp_path_factory.mktemp("bowl")
  make_stage1(root / "stage1_train.zip", 14)
  arguments = "nuclei", f"--archives={root}", f"--out={root / 'nuclei'}"
  code, _, err = command.run("segjax.prepare", *arguments)
  assert code == 2 and "stage1_train has 14 images, not 670" in err, err
  code, out, err = command.run("segjax.prepare", *arguments, "--allow_partial")
  assert code == 0 and "14 images, 2 of them in val.txt" in out, err
  return root / "nuclei"


@pytest.fixture
def nuclei(bowl, tmp_path, monkeypatch):
  """A copy of it, and a cache of its own for weight maps."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  shutil.copytree(bowl, tmp_path / "nuclei")
  return tmp_path / "nuclei"


def nuclei_config(root):
  """The recipe, small; the crops are larger than the smaller images."""
  config = importlib.import_module("configs.unet_nuclei").get_config()
  config.data.dir, config.num_steps, config.eval_every, config.checkpoint_every = str(root), 60, 60, 60
  config.crop_size, config.model.width, config.model.depth, config.mesh.data = (72, 72), 4, 2, 1
  config.batch_size = 4
  config.optimizer.base_lr, config.optimizer.warmup_steps, config.optimizer.ema_decay = 1e-2, 5, 0.9
  return config_lib.finalize(config)


def read(path):
  with Image.open(path) as file:
    return np.asarray(file)


def test_one_file_per_nucleus_becomes_one_mask_per_image_and_lists_share_out_all_images(bowl):
  lists = [(bowl / f"{split}.txt").read_text().split() for split in ("train", "val")]
  assert sorted(lists[0] + lists[1]) == nucleus_ids(14) and list(map(len, lists)) == [12, 2]
  for number, name in enumerate(nucleus_ids(14)):
    want, stored = instances_of(number), read(bowl / f"instances/{name}.png")
    assert stored.dtype == np.uint16
    pairs = np.unique(np.stack([want, stored], -1).reshape(-1, 2), axis=0)  # The same instances under other numbers:
    assert len(pairs) == want.max() + 1 and sorted(pairs[:, 1]) == list(range(want.max() + 1)) and (pairs[0] == 0).all()
    np.testing.assert_array_equal(read(bowl / f"masks/{name}.png"), np.where(want > 0, 255, 0))
    np.testing.assert_array_equal(read(bowl / f"images/{name}.png")[..., :3], photo(want > 0, number))


def test_preparing_nuclei_again_writes_only_what_is_missing(nuclei):
  def stamps():
    return {path: path.stat().st_mtime_ns for path in nuclei.rglob("*.*")}

  before, name = stamps(), nucleus_ids(1)[0]
  prepare.prepare_nuclei(nuclei / "stage1_train", nuclei, allow_partial=True)
  assert stamps() == before
  content = (nuclei / f"instances/{name}.png").read_bytes()
  (nuclei / f"instances/{name}.png").unlink()
  prepare.prepare_nuclei(nuclei / "stage1_train", nuclei, allow_partial=True)
  changed = {path for path, stamp in stamps().items() if stamp != before[path]}
  assert changed and all(path.name == f"{name}.png" for path in changed)
  assert (nuclei / f"instances/{name}.png").read_bytes() == content


@pytest.mark.parametrize(
  "spoil, message",
  [
    (
      lambda folder, name: (folder / f"images/{name}.png").unlink(),
      "lacks 00001eef/images/00001eef.png. Unpack stage1_train.zip again",
    ),
    (lambda folder, name: shutil.rmtree(folder / "masks"), "lacks 00001eef/masks/.*the other archives have no masks"),
    (
      lambda folder, name: next((folder / "masks").iterdir()).write_bytes(png(np.zeros((9, 9), np.uint8))),
      "00001eef/masks/.* is 9x9, but .*00001eef.png is 64x64",
    ),
    (
      lambda folder, name: next((folder / "masks").iterdir()).write_bytes(b"PNG"),
      "00001eef/masks/.*damaged or truncated",
    ),
  ],
)
def test_what_is_wrong_in_the_bowls_folders_is_named(nuclei, tmp_path, spoil, message):
  name = nucleus_ids(1)[0]
  spoil(nuclei / "stage1_train" / name, name)
  with pytest.raises(DataError, match=message):
    prepare.prepare_nuclei(nuclei / "stage1_train", tmp_path / "again", allow_partial=True)


@pytest.mark.full
def test_nuclei_of_several_sizes_train_and_score(nuclei, tmp_path, capsys):
  config = nuclei_config(nuclei)
  assert check_data.check(config) == 0
  scores = train_lib.train(config, tmp_path / "run")
  assert scores["val/foreground_iou"] > 0.8, scores
  assert "foreground (nucleus): IoU" in capsys.readouterr().out
  pictures = {path.stem: read(path).shape for path in (tmp_path / "run/overlays").rglob("*.png")}
  for name in (nuclei / "val.txt").read_text().split():
    h, w = SIZES[nucleus_ids(14).index(name) % 3]
    assert pictures[f"images_{name}"] == (h, 3 * w, 3)


def test_the_ground_between_touching_nuclei_weighs_more(nuclei):
  config = nuclei_config(nuclei)
  source = input_pipeline.make_source(config.data, "train")
  number = nucleus_ids(14).index(source.describe(0).rpartition("/")[2])
  border, instances = source.border(0).astype(float), instances_of(number)
  assert not border[instances > 0].any()
  row, col = 12 - 6, 16  # Above the first pair's waist.
  apart = np.array([ndimage.distance_transform_edt(instances != n)[row, col] for n in (1, 2)])
  np.testing.assert_allclose(border[row, col], np.exp(-(apart.sum() ** 2) / 50), rtol=2e-3)


@pytest.fixture(scope="module")
def isbi(tmp_path_factory):
  """images/N.png, labels/N.png, N as numbered in the challenge: Voronoi cells with dark membranes between them."""
  root = tmp_path_factory.mktemp("isbi")
  for folder in ("images", "labels"):
    (root / folder).mkdir()
  for name in ISBI_NAMES:
    rng = np.random.default_rng(name)
    points = rng.uniform(0, 96, (30, 2))
    distance = np.sort(np.hypot(*(np.mgrid[:96, :96][..., None] - points.T.reshape(2, 1, 1, -1))), axis=-1)
    cell = distance[..., 1] - distance[..., 0] > 3
    Image.fromarray(photo(cell, name)[..., 0]).save(root / f"images/{name}.png")
    Image.fromarray(cell.astype(np.uint8) * 255).save(root / f"labels/{name}.png")
  return root


def isbi_config(root, monkeypatch):
  """The recipe, small: a border of 20 pixels, tiles that do not fill the image evenly."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
  config = importlib.import_module("configs.unet_isbi").get_config()
  config.data.dir, config.num_steps, config.eval_every, config.checkpoint_every = str(root), 60, 60, 60
  config.crop_size, config.model.width, config.model.depth, config.mesh.data = (44, 44), 4, 2, 1
  config.eval.window = config.eval.window_stride = (36, 36)
  config.augment.elastic = 2.0  # Of crops a fifth as large.
  config.optimizer.base_lr, config.optimizer.warmup_steps, config.optimizer.ema_decay = 1e-2, 5, 0.9
  return config_lib.finalize(config)


@pytest.mark.full
def test_membranes_train_and_score_in_tiles_as_they_do_whole(isbi, tmp_path, monkeypatch, capsys):
  config = isbi_config(isbi, monkeypatch)
  assert check_data.check(config) == 0
  output = capsys.readouterr().out
  assert "train: 15 examples" in output and "val: 5 examples" in output
  tiled = train_lib.train(config, tmp_path / "run")
  assert min(tiled["val/iou/cell"], tiled["val/iou/membrane"]) > 0.75, tiled  # All cells: 0.59 and 0.
  config.eval.window = config.eval.window_stride = (0, 0)
  whole = evaluate_lib.evaluate(config, tmp_path / "run")
  assert {name: pytest.approx(score, abs=1e-4) for name, score in whole.items()} == tiled


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(data=dict(classes=("nucleus",))), "a softmax over it is 1 everywhere.*data.classes=background,nucleus"),
    (dict(data=dict(classes=("a", "b", "c"))), "tells foreground from background.*3 classes"),
    (dict(policy=dict(metric="iou/nucelus")), "choose one of .*foreground_iou.*Did you mean iou/nucleus"),
    (dict(policy=dict(metric="iou/nucelus", plateau_factor=0.5)), "Did you mean iou/nucleus"),
    (dict(data=dict(label_map="")), "255 is void, so class 'nucleus' never occurs.*data.label_map=255:1"),
    (
      dict(data=dict(masks="instances")),
      "49 label values outside the 2 classes.*smoothed or resized, or .* numbers instances",
    ),
    (dict(data=dict(instances="nowhere")), 'no such folder.*data.instances.*"components".*border_weight = 0'),
    (dict(data=dict(instances="masks")), "no mask of instances, it holds 0 and 255 alone.*components"),
    (dict(data=dict(instances="images")), "no mask of instances. Store one number per instance"),
  ],
)
def test_mistakes_are_told_before_a_workdir_is_made(nuclei, tmp_path, change, message):
  config = nuclei_config(nuclei)
  for section, fields in change.items():
    config[section].update(fields)
  with pytest.raises((ConfigError, DataError), match=f"(?s){message}"):
    train_lib.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_check_data_names_every_mask_of_instances_that_does_not_fit(nuclei, capsys):
  name = (nuclei / "train.txt").read_text().split()[3]
  Image.fromarray(np.ones((5, 6), np.uint16)).save(nuclei / f"instances/{name}.png")
  assert check_data.check(nuclei_config(nuclei)) == 1
  assert f"instances/{name}.png is 5x6, but" in capsys.readouterr().out


def test_rand_error_counts_pairs_of_pixels_by_hand():
  two_cells = np.array([[1, 1, 0, 2, 2]])
  assert rand_error(two_cells, two_cells * 7) == 0
  # Merged: 8 ordered pairs are together in both, 8 in truth, 16 in the prediction; the pixel between does not count.
  assert rand_error(two_cells, np.ones((1, 5), int)) == pytest.approx(1 - 2 * 8 / (8 + 16))
  # Half of a cell missed: 2 * 2 + 1 + 1 pairs are together in both, 16 in truth, 6 in the prediction.
  assert rand_error(np.ones((1, 4), int), np.array([[3, 3, 0, 0]])) == pytest.approx(1 - 2 * 6 / (16 + 6))
