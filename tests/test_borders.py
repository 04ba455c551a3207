"""The weight map between instances: against its formula, cached, through the loaders into the loss."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from segjax import input_pipeline
from segjax.config import ConfigError, default_config
from segjax.config.rules import validate
from segjax.input_pipeline import DataError, borders


def discs(seed=0, count=7, size=(60, 70)):
  """Instances that lie close to each other, numbers with gaps."""
  rng, instances = np.random.default_rng(seed), np.zeros(size, np.int32)
  y, x = np.mgrid[: size[0], : size[1]]
  for number in range(count):
    row, col, radius = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(3, 9)
    instances[((y - row) ** 2 + (x - col) ** 2 < radius**2) & (instances == 0)] = 3 * number + 2
  return instances


@pytest.mark.parametrize("sigma", [2.0, 5.0])
def test_the_map_is_equation_2_of_the_papers_from_two_whole_distance_transforms(sigma):
  instances = discs()
  numbers = [n for n in np.unique(instances) if n]
  distances = np.sort(np.stack([ndimage.distance_transform_edt(instances != n) for n in numbers]), axis=0)
  want = np.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2)) * (instances == 0)
  np.testing.assert_allclose(borders.border_map(instances, sigma), want, atol=1e-7)


def test_two_touching_instances_by_hand():
  row = np.array([[1, 1, 0, 0, 2, 2]])  # The third pixel is 1 from the first instance and 2 from the second.
  np.testing.assert_allclose(borders.border_map(row, 5.0), [[0, 0, *[np.exp(-9 / 50)] * 2, 0, 0]], rtol=1e-6)
  for alone in (np.zeros((4, 5), int), np.eye(5, dtype=int)[:4] * 0 + np.array([0, 0, 7, 0, 0])):
    assert not borders.border_map(alone, 5.0).any()


@pytest.fixture
def root(tmp_path, monkeypatch):
  """Five images with masks and 16-bit instances; the cache lies in tmp_path."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  rng = np.random.default_rng(0)
  for folder in ("images", "masks", "instances"):
    (tmp_path / "data" / folder).mkdir(parents=True)
  for i in range(5):
    instances = discs(i, size=(40, 48))
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"data/images/{i}.png")
    Image.fromarray((instances > 0).astype(np.uint8) * 255).save(tmp_path / f"data/masks/{i}.png")
    Image.fromarray(instances.astype(np.uint16) * 100).save(tmp_path / f"data/instances/{i}.png")
  return tmp_path / "data"


def config_of(root, **options):
  config = default_config(data="folder")
  fields = dict(images="images", masks="masks", classes=("ground", "cell"), label_map="255:1", instances="instances")
  config.data.update(dir=str(root), **(fields | dict(folds=5) | options))
  return config


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_batches_carry_the_map_of_their_image(root, loader):
  config = config_of(root, loader=loader)
  source = input_pipeline.make_source(config.data, "train")
  options = dict(seed=0, batch_size=2, rows=np.arange(2), start_step=0, num_steps=2, border=True)
  for batch in input_pipeline.train_batches(source, config.data, **options):
    assert batch["border"].dtype == np.float16 and batch["border"].shape == (2, 40, 48)
    for index, border in zip(batch["id"], batch["border"]):
      want = borders.border_map(discs(int(source.describe(int(index)).rpartition("/")[2]), size=(40, 48)), 5.0)
      np.testing.assert_allclose(border, want, atol=1e-3)


def test_a_map_is_computed_once_and_again_when_its_file_changes(root, monkeypatch):
  config, calls, true = config_of(root), [], borders.border_map
  monkeypatch.setattr(borders, "border_map", lambda *a: calls.append(1) or true(*a))
  for _ in range(2):
    first = input_pipeline.make_source(config.data, "val").border(0)
  assert len(calls) == 1 and first.any()
  config.data.border_sigma = 2.0
  assert input_pipeline.make_source(config.data, "val").border(0).sum() < first.sum() and len(calls) == 2
  config.data.border_sigma = 5.0
  name = input_pipeline.make_source(config.data, "val").describe(0).rpartition("/")[2]
  Image.fromarray(np.zeros((40, 48), np.uint16)).save(root / "instances" / f"{name}.png")
  assert not input_pipeline.make_source(config.data, "val").border(0).any() and len(calls) == 3


def test_connected_components_of_the_mask_are_instances(root):
  source = input_pipeline.make_source(config_of(root, instances="components").data, "train")
  want = borders.border_map(ndimage.label(source[1][1] == 1)[0], 5.0)
  np.testing.assert_allclose(source.border(1), want, atol=1e-3)


def test_a_weight_map_without_instances_is_refused_with_the_remedy(root):
  config = config_of(root, instances="")
  config.loss.border_weight = 10.0
  with pytest.raises(ConfigError, match='set data.instances of the folder source to their masks, or to "components"'):
    validate(config)
  (root / "instances/2.png").unlink()
  (root / "instances/3.png").unlink()
  source = input_pipeline.make_source(config_of(root, fold=1).data, "train")
  with pytest.raises(DataError, match="masks of instances are missing"):
    source.border(0)


def test_folds_share_out_all_images_evenly_and_a_seed_shares_them_out_anew(root):
  def names(split, **options):
    source = input_pipeline.make_source(config_of(root, **options).data, split)
    return {source.describe(i) for i in range(len(source))}

  held = [names("val", folds=3, fold=fold) for fold in range(3)]
  assert sorted(map(len, held)) == [1, 2, 2] and len(set().union(*held)) == 5
  for fold in range(3):
    assert names("train", folds=3, fold=fold) == set().union(*held) - held[fold]
  assert any(names("val", folds=3, fold=0, split_seed=seed) != held[0] for seed in range(1, 6))
