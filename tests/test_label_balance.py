"""data.sampling = class_balanced and augment.foreground: what is drawn, from where, and that all who draw agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from segjax import augment
from segjax.augment import foreground
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, scan
from tests.experiment import assert_same_batches, fetched, mesh_of
from tests.folder_of_images import folder_of_images


@pytest.fixture
def folder(tiny_config, tmp_path, monkeypatch):
  """12 images of training, of which the last alone holds the last class, and a cache folder."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config = folder_of_images(tiny_config, tmp_path / "data")
  for path in sorted((tmp_path / "data/masks/train").iterdir()):
    mask = np.zeros((24, 32), np.uint8)
    mask[8:12, 8:12] = 1
    mask[0, :2] = 5 if path.stem == "11" else 2
    mask[1, :3], mask[2, :3] = 3, 4
    Image.fromarray(mask).save(path)
  config.data.classes = tuple("abcdef")
  config.data.sampling, config.data.sampling_temperature = "class_balanced", 1.0
  return config


def test_both_loaders_and_the_device_cache_draw_the_same_batches(folder):
  found = []
  for loader in ("tf_data", "grain"):
    folder.data.loader = loader
    found.append(list(Experiment(folder, mesh=mesh_of(4, 2)).train_batches(0, 3)))
  folder.data.cache = "device"
  found.append(fetched(Experiment(folder, mesh=mesh_of(4, 2)), 3))
  for other in found[1:]:
    assert_same_batches(found[0], other)
  ids = np.concatenate([batch["id"] for batch in found[0]])
  balance = Experiment(folder).balance
  np.testing.assert_array_equal(ids, balance.draw(folder.seed, np.arange(24)))
  assert (ids == 11).sum() >= 2  # Alone in its class, which is one draw of six; uniform draws have it twice.


def test_a_resumed_run_and_every_host_draw_what_one_run_of_one_host_draws(folder):
  whole = list(Experiment(folder).train_batches(0, 3))
  (late,) = Experiment(folder).train_batches(2, 3, rows=[5, 6])
  for name in whole[2]:
    np.testing.assert_array_equal(late[name], whole[2][name][5:7])


def test_labels_are_counted_once_until_a_file_changes(folder, monkeypatch):
  experiment = Experiment(folder)
  counts = scan.class_counts(experiment.train_source)
  want = [np.bincount(experiment.train_source[i][1].ravel(), minlength=6)[:6] for i in range(12)]
  np.testing.assert_array_equal(counts, want)
  with monkeypatch.context() as patched:
    patched.setattr(scan, "scan", lambda *_: pytest.fail("read again"))
    np.testing.assert_array_equal(scan.class_counts(Experiment(folder).train_source), want)
  Image.fromarray(np.zeros((24, 32), np.uint8)).save(f"{folder.data.dir}/masks/train/00.png")
  assert scan.class_counts(Experiment(folder).train_source)[0].tolist() == [24 * 32, 0, 0, 0, 0, 0]


def test_a_class_that_never_occurs_is_named_with_remedies(folder):
  mask = np.array(Image.open(f"{folder.data.dir}/masks/train/10.png"))
  Image.fromarray(mask).save(f"{folder.data.dir}/masks/train/11.png")
  name = Experiment(folder).train_source.classes[5]
  with pytest.raises(ConfigError, match=rf"no training label holds {name}, .*data.classes.*data.sampling to uniform"):
    Experiment(folder).train_batches(0, 1)


def test_a_label_that_cannot_be_read_is_named(folder):
  with open(f"{folder.data.dir}/masks/train/03.png", "r+b") as file:
    file.truncate(60)
  with pytest.raises(DataError, match="03.png"):
    Experiment(folder).train_batches(0, 1)


def test_the_chosen_pixel_has_its_class_and_classes_and_pixels_are_drawn_as_configured():
  label = np.full((12, 10), 255, np.uint8)
  label[2:8, 1:9], label[3, 4:7], label[10, 9] = 0, 1, 2
  classes = np.array([0.0, 0.5, 0.25, 0.25])  # Class 3 is not there, and 1 and 2 share its part 2 to 1.
  draw = jax.jit(jax.vmap(lambda key: foreground.choose_pixel(key, jnp.asarray(label), jnp.asarray(classes), 0.75)))
  rows, cols = map(np.asarray, draw(jax.random.split(jax.random.key(0), 4000)))
  none = rows < 0
  assert ((cols < 0) == none).all() and abs(none.mean() - 0.25) < 0.03
  at, counts = np.unique(np.stack([rows[~none], cols[~none]]), axis=1, return_counts=True)
  assert at.T.tolist() == [[3, 4], [3, 5], [3, 6], [10, 9]]
  np.testing.assert_allclose(counts / counts.sum(), [2 / 9, 2 / 9, 2 / 9, 1 / 3], atol=0.03)
  empty = foreground.choose_pixel(jax.random.key(0), jnp.zeros((5, 5), jnp.uint8), jnp.asarray(classes), 1.0)
  assert [int(x) for x in empty] == [-1, -1]


@pytest.mark.parametrize("size", [(100, 90), (20, 90), (12, 12)])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.6, 2.0)])
def test_foreground_crops_hold_the_one_object_wherever_it_lies(size, scale):
  """Objects of 3 x 3 pixels, which no scale loses; also in corners, and in images smaller than the crop."""
  rng = np.random.default_rng(0)
  image, label = np.zeros((48, 100, 90, 3), np.uint8), np.zeros((48, 100, 90), np.uint8)
  corners = [(0, 0), (0, size[1] - 3), (size[0] - 3, 0), (size[0] - 3, size[1] - 3)]
  for i in range(48):
    row, col = corners[i] if i < 4 else (int(rng.integers(n - 2)) for n in size)
    label[i, row : row + 3, col : col + 3] = 1
  batch = dict(image=image, label=label, size=np.array([size] * 48, np.int32))

  def crops(**options):
    options = augment.Augmentation(scale=scale, **options)
    keywords = dict(crop_size=(24, 20), margin=0, fill=(0, 0, 0), ignore_label=255, num_classes=2)
    made = augment.augment_batch(jax.random.key(3), batch, options=options, classes=np.array([0.0, 1.0]), **keywords)
    return np.asarray(made[1])

  held = (crops(foreground=1.0, flip_vertical=True) == 1).any((1, 2))
  assert held.all()
  if size == (100, 90):
    assert (crops() == 1).any((1, 2)).mean() < 0.6
    positions = {tuple(np.argwhere(label == 1)[0]) for label in crops(foreground=1.0)}
    assert len(positions) > 30  # Not always in the middle.


def test_foreground_crops_see_whole_images_and_the_class_that_the_sampling_favours(folder):
  folder.data.sampling_temperature, folder.augment.scale = 1e-4, (1.0, 1.0)
  folder.crop_size = (8, 8)
  held = {}
  for folder.augment.foreground in (0.0, 1.0):
    experiment = Experiment(folder)
    assert (experiment.crop_window is None) == (folder.augment.foreground == 1)
    batch = next(experiment.train_batches(0, 1))
    assert (batch["id"] == 11).all() and batch["image"].shape == (8, 24, 32, 3)
    _, label, _ = experiment.augment_batch(jax.random.key(0), batch)
    held[folder.augment.foreground] = (label == 5).any((1, 2)).mean()
  assert held[1.0] == 1 and held[0.0] < 0.7
