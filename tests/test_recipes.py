"""The recipes of configs/ on generated trees of the real layouts: read, trained, scored and, where masks err, refused."""

import importlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from segjax import config as config_lib
from segjax import input_pipeline, optimizer, pretrained, sharding
from segjax import train as train_lib
from segjax.config import ConfigError
from segjax.config import rules as config_rules
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError
from segjax.pretrained import registry, torchvision
from segjax.run import warm_start
from segjax.tools import prepare, submission
from tests import archives
from tests.marks import full

NORM = ("weight", "bias", "running_mean", "running_var")


def scene(name, size, object_size=0.5):
  """An image [H, W, 3] with a bright disc on dark ground, and its mask [H, W] bool."""
  rng = np.random.default_rng(list(name.encode()))
  y, x = np.mgrid[: size[0], : size[1]]
  row, col = rng.uniform(0.4, 0.6, 2) * size
  mask = (y - row) ** 2 + (x - col) ** 2 < (object_size * size[0] / 2) ** 2
  image = 50 + 130 * mask[..., None] + rng.normal(0, 12, (*size, 3))
  return image.clip(0, 255).astype(np.uint8), mask


def write(path, array):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)
  return path


def make_kitti_road(root):
  """data_road: 4 um, 3 umm and 3 uu images of three sizes; road, other road (black), lanes for um; testing images."""
  for n, name in enumerate([f"{c}_{i:06d}" for c, count in (("um", 4), ("umm", 3), ("uu", 3)) for i in range(count)]):
    size = ((75, 248), (74, 244), (76, 246))[n % 3]
    image, road = scene(name, size, 0.9)
    mask = np.where(road[..., None], np.uint8([255, 0, 255]), np.uint8([255, 0, 0]))
    mask[:5] = 0
    category, number = name.split("_")
    write(root / f"training/image_2/{name}.png", image)
    write(root / f"training/gt_image_2/{category}_road_{number}.png", mask)
    if category == "um":
      mask[:, : size[1] // 2] = (255, 0, 0)
      write(root / f"training/gt_image_2/um_lane_{number}.png", mask)
    if n < 2:
      write(root / f"testing/image_2/{name}.png", image)
  return root


def make_carvana(root):
  """6 cars from 3 angles; the masks are GIFs that hold 0 and 1."""
  for car in ("00087a6bd4dc", "02159e548029", "04dd3b9f3a1b", "0cdf5b5d0ce1", "1c93b01be3a9", "fff9b3a5373f"):
    for angle in (1, 2, 16):
      image, mask = scene(f"{car}_{angle:02d}", (80, 120))
      write(root / f"train/{car}_{angle:02d}.jpg", image)
      picture = Image.fromarray(mask.astype(np.uint8), mode="P")
      picture.putpalette([0, 0, 0, 255, 255, 255])
      path = root / f"train_masks/{car}_{angle:02d}_mask.gif"
      path.parent.mkdir(exist_ok=True)
      picture.save(path)
  return root


def make_salt(root):
  """12 images of 101x101; masks of 16 bits, one of 8, and three that are empty."""
  for n in range(12):
    image, mask = scene(f"salt{n}", (101, 101))
    mask = np.zeros_like(mask) if n % 4 == 3 else mask
    write(root / f"images/{n:010x}.png", image)
    write(root / f"masks/{n:010x}.png", mask.astype(np.uint8) * 255 if n == 1 else mask.astype(np.uint16) * 65535)
  (root.parent / "depths.csv").write_text("id,z\n0000000000,306\n")
  return root


def make_chairs(root):
  """97 images of several sizes; masks of two colours."""
  for n in range(97):
    image, mask = scene(f"chair{n}", ((60, 48), (48, 64))[n % 2])
    write(root / f"images/chair_{n}.jpg", image)
    write(root / f"masks/chair_{n}.png", np.repeat(mask[..., None].astype(np.uint8) * 255, 3, -1))
  return root


def recipe(name, root, argument=None, **changes):
  """The recipe cut to seconds: a narrow network, small crops, few steps; all else is its own."""
  get_config = importlib.import_module(f"configs.{name}").get_config
  config = get_config(argument) if argument else get_config()
  config.data.dir, config.data.loader, config.data.workers = str(root), "grain", 2
  config.mesh.data, config.eval.num_overlays = 1, 2
  config.model.width, config.eval.batch_size = 4 if config.model.name == "unet" else 2, 2
  config.num_steps = config.eval_every = config.checkpoint_every = 2
  config.log_every, config.optimizer.warmup_steps = 1, min(config.optimizer.warmup_steps, 1)
  config.batch_size = min(config.batch_size, 2)
  for field, value in changes.items():
    section, _, leaf = field.rpartition(".")
    (config[section] if section else config)[leaf] = value
  config = config_lib.finalize(config)
  config_rules.validate(config)
  return config


def train_and_evaluate(config, workdir):
  """The evaluation of the last checkpoint, whose scores are those of training's end."""
  scores = train_lib.train(config, workdir)
  config.eval.checkpoint = "last"
  evaluator, variables = make_evaluator(config, workdir)
  evaluation = evaluator(variables)
  assert evaluation.scalars == pytest.approx(scores, nan_ok=True)
  return evaluation


def make_evaluator(config, workdir):
  """Of val, and the variables of the last checkpoint."""
  experiment = Experiment(config, mesh=sharding.make_mesh(1))
  return experiment.evaluator, experiment.trained_variables(workdir, None)[0]


def names(config, split):
  source = input_pipeline.make_source(config.data, split, labels=False)
  return [source.describe(i) for i in range(len(source))]


# KITTI road.


def test_kitti_road_reads_road_masks_and_leaves_lanes_and_other_road_alone(tmp_path):
  config = recipe("fcn8_kitti_road", make_kitti_road(tmp_path / "data_road").parent)
  train, val = names(config, "train"), names(config, "val")
  assert len(train) == 8 and len(val) == 2 and not set(train) & set(val)
  assert names(config, "trainval") == sorted(train + val) and names(config, "test") == ["um_000000", "um_000001"]
  source = input_pipeline.make_source(config.data, "trainval")
  assert source.classes == ("background", "road") and source.palette.tolist() == [[0, 0, 0], [0, 255, 0]]
  image, label = source[0]
  _, road = scene("um_000000", (75, 248), 0.9)
  np.testing.assert_array_equal(label[5:], road[5:])
  assert (label[:5] == 255).all() and image.shape == (75, 248, 3)
  assert source.notes == ("split 'training' has 10 images, the official one 289",)
  config.data.labels = "lane"
  lane = input_pipeline.make_source(config.data, "trainval")
  assert names(config, "trainval") == [f"um_{i:06d}" for i in range(4)] and lane.classes[1] == "lane"
  assert not (lane[0][1][5:, :124] == 1).any() and (lane[0][1] == 1).any()


@pytest.mark.full
def test_kitti_road_trains_scores_at_full_size_and_predicts_images_without_labels(tmp_path):
  config = recipe("fcn8_kitti_road", make_kitti_road(tmp_path / "data_road"), crop_size=(32, 112))
  evaluation = train_and_evaluate(config, tmp_path / "run")
  source = input_pipeline.make_source(config.data, "val")
  valid = sum((source[i][1] != 255).sum() for i in range(len(source)))
  assert evaluation.confusion.sum() == valid and len(evaluation.pictures) == 2
  config.data.eval_split = "test"
  archive = submission.submit(config, tmp_path / "run")
  with Image.open(archive.parent / "results/um_000001.png") as prediction:
    assert prediction.size == (244, 74) and prediction.mode == "P"
    assert prediction.getpalette()[3:6] == [0, 255, 0]  # Road is green.


@pytest.mark.parametrize(
  "damage, changes, message",
  [
    (
      lambda r: write(r / "training/gt_image_2/um_road_000001.png", np.full((74, 244, 3), 9, np.uint8)),
      {},
      r"um_road_000001\.png: an RGB mask with colours that no class has: 090909 .* restore the file from data_road.zip",
    ),
    (
      lambda r: write(r / "training/gt_image_2/um_road_000001.png", np.zeros((74, 244), np.uint8)),
      {},
      "not an RGB file",
    ),
    (
      lambda r: (r / "training/gt_image_2/uu_road_000002.png").unlink(),
      {},
      r"1 of 10 masks are missing: uu_road_000002.png. Unzip data_road.zip again\.$",
    ),
    (
      lambda r: [p.unlink() for p in r.glob("training/*/um*_*_*.png") if "lane" not in p.name],
      {},
      "7 of 10 masks are missing",
    ),
    (
      lambda r: [p.unlink() for p in r.glob("training/*/u*") if p.name.startswith(("umm", "uu", "um_road"))],
      {},
      "4 of 4 masks are missing: .* The masks of the lane are there: data.labels=lane",
    ),
    (lambda r: (r / "training").rename(r / "train"), {}, "no folder training/image_2 there"),
    (lambda r: [p.unlink() for p in r.glob("training/image_2/*")], {}, "holds no um_"),
    (lambda r: None, dict(train_split="training"), "no split 'training': choose one of train, val, trainval, test"),
    (lambda r: None, dict(folds=0, holdout=10.0), "data.holdout = 10 holds out all of the 10 images"),
    (lambda r: None, dict(folds=0, holdout=1e-9, train_split="val"), "'val' of .* is empty. Hold out more"),
  ],
)
def test_mistakes_in_kitti_road_are_named(tmp_path, damage, changes, message):
  root = make_kitti_road(tmp_path / "data_road")
  damage(root)
  config = recipe("fcn8_kitti_road", root)
  config.data.update(changes)
  with pytest.raises(DataError, match=message):
    source = input_pipeline.make_source(config.data, config.data.train_split)
    _ = [source[i] for i in range(len(source))], [p for p in input_pipeline.make_source(config.data, "val")]


def test_choices_of_labels_depend_on_the_data_set():
  config = recipe("fcn8_kitti_road", "/data")
  config.data.labels = "gtFine"
  with pytest.raises(ConfigError, match="data.labels = 'gtFine': choose one of road, lane"):
    config_rules.validate(config)


# U-Net on an encoder.


def test_resnet34s_weights_fit_what_unet_voc_excludes():
  """torchvision's names: all of the encoder is taken and nothing else, and no name is left over."""
  config = importlib.import_module("configs.unet_voc").get_config("resnet34")
  config.mesh.data, config.data.dir = 1, "/data"
  config_rules.validate(config_lib.finalize(config))
  entry = registry.REGISTRY[config.init.path]
  wanted = f"unet, model.encoder={config.model.encoder}, init.exclude={','.join(config.init.exclude)}"
  assert wanted in entry.network and entry.url.endswith("/resnet34-b627a593.pth")
  arrays = {"fc.weight": np.ones((1000, 512), np.float32), "fc.bias": np.ones(1000, np.float32)}

  def add(conv, norm, shape):
    arrays[f"{conv}.weight"] = np.ones(shape, np.float32)
    arrays.update({f"{norm}.{leaf}": np.ones(shape[0], np.float32) for leaf in NORM})

  add("conv1", "bn1", (64, 3, 7, 7))
  below = 64
  for layer, (units, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), start=1):
    for n in range(units):
      unit = f"layer{layer}.{n}"
      if below != width:
        add(f"{unit}.downsample.0", f"{unit}.downsample.1", (width, below, 1, 1))
      add(f"{unit}.conv1", f"{unit}.bn1", (width, below, 3, 3))
      add(f"{unit}.conv2", f"{unit}.bn2", (width, width, 3, 3))
      below = width
  variables = jax.eval_shape(Experiment(config, num_classes=21).init).variables()
  merged, _ = warm_start.merge(variables, (pretrained.SCHEMES[entry.scheme](arrays), "file"), config.init.exclude)
  assert not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(merged["params"]["backbone"]))
  for part in config.init.exclude:
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(merged["params"][part]))


# Binary recipes of the folder source.


@pytest.mark.full
def test_carvana_holds_out_whole_cars_and_learns_from_gifs(tmp_path):
  root = make_carvana(tmp_path / "carvana")
  config = recipe("unet_carvana", root, num_steps=30, crop_size=(16, 16), **{"model.depth": 2, "model.width": 8})
  config.eval_every = config.checkpoint_every = 15
  cars = [{name.split("/")[1].split("_")[0] for name in names(config, split)} for split in ("train", "val")]
  assert len(cars[0]) == 4 and len(cars[1]) == 2 and not cars[0] & cars[1]
  assert len(names(config, "val")) == 6
  source = input_pipeline.make_source(config.data, "val")
  np.testing.assert_array_equal(source[0][1], scene(source.describe(0).removeprefix("train/"), (80, 120))[1])
  evaluation = train_and_evaluate(config, tmp_path / "run")
  assert evaluation.scalars["val/foreground_iou"] > 0.5 and evaluation.confusion.sum() == 6 * 80 * 120


@pytest.mark.full
def test_salt_stands_mirrored_in_its_frame_and_is_scored_without_it(tmp_path):
  config = recipe("unet_salt", make_salt(tmp_path / "salt"), num_steps=20, **{"model.depth": 2})
  config.eval_every = config.checkpoint_every = 20
  source = input_pipeline.make_source(config.data, "train")
  val = len(names(config, "val"))
  assert len(source) + val == 12 and source.canvas_size == (101, 101)
  labels = [source[i][1] for i in range(len(source))]
  assert {tuple(np.unique(label)) for label in labels} == {(0,), (0, 1)}
  evaluation = train_and_evaluate(config, tmp_path / "run")
  assert evaluation.scalars["val/foreground_iou"] > 0.3 and evaluation.confusion.sum() == val * 101 * 101
  # The mirror is what the network sees: the same as of images that were mirrored before, not of ones in a blank frame.
  source = input_pipeline.make_source(config.data, "val")
  batch = next(input_pipeline.eval_batches(source, config.data, batch_size=2, rows=np.arange(2)))
  evaluator, variables = make_evaluator(config, tmp_path / "run")
  seen = np.asarray(evaluator.step(variables, batch)["prediction"])
  config.eval.outside = "void"
  evaluator, variables = make_evaluator(config, tmp_path / "run")
  blank = np.asarray(evaluator.step(variables, batch)["prediction"])
  frame = ((0, 0), (0, 27), (0, 27), (0, 0))
  batch |= dict(image=np.pad(batch["image"][:, :101, :101], frame, "reflect"), size=np.full((2, 2), 128, np.int32))
  np.testing.assert_array_equal(seen, evaluator.step(variables, batch)["prediction"])
  assert seen.shape == (2, 128, 128) and (seen != blank).any()


@pytest.mark.full
def test_chairs_are_split_77_to_20_and_train(tmp_path):
  config = recipe(
    "unet_chairs",
    make_chairs(tmp_path / "chairs"),
    num_steps=30,
    crop_size=(24, 24),
    **{"model.depth": 2, "model.width": 8},
  )
  config.eval_every = config.checkpoint_every = 30
  train, val = names(config, "train"), names(config, "val")
  assert len(train) == 77 and len(val) == 20 and len({*train, *val}) == 97
  config.data.split_seed = 1
  assert set(names(config, "val")) != set(val)
  config.data.split_seed = 0
  assert train_and_evaluate(config, tmp_path / "run").scalars["val/foreground_iou"] > 0.5


@pytest.mark.parametrize(
  "name, make, path, mask, message",
  [
    (
      "unet_carvana",
      make_carvana,
      "train_masks/00087a6bd4dc_01_mask.png",
      np.full((80, 120), 2, np.uint8),
      r"_mask\.png: label values outside the 2 classes .*: 2 \(9600 px\). Map them with data.label_map, e.g. 2:1",
    ),
    (
      "unet_salt",
      make_salt,
      "masks/0000000000.png",
      np.full((101, 101), 257, np.uint16),
      r"0000000000\.png: label values outside the 2 classes .*: 257 \(10201 px\)",
    ),
    (
      "unet_chairs",
      make_chairs,
      "masks/chair_0.png",
      np.tile(np.uint8([0, 0, 254]), (60, 48, 1)),
      r"chair_0\.png: an RGB mask with colours that no class has: 0000FE \(2880 px\). Name every class's colour",
    ),
    ("unet_chairs", make_chairs, "masks/chair_0.jpg", np.zeros((60, 48, 3), np.uint8), "a JPEG cannot hold labels"),
  ],
)
def test_masks_with_a_third_value_are_refused_with_the_remedy(tmp_path, name, make, path, mask, message):
  root = make(tmp_path / "data")
  for old in (root / path).parent.glob(f"{(root / path).stem}.*"):
    old.unlink()
  write(root / path, mask)
  config = recipe(name, root)
  with pytest.raises(DataError, match=message):
    for split in ("train", "val"):
      source = input_pipeline.make_source(config.data, split)
      _ = [source[i] for i in range(len(source))]


# FCN in stages.


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
  folder = tmp_path_factory.mktemp("voc")
  archives.make_voc(folder)
  root, sbd = prepare.unpack_voc(folder, folder / "data")
  prepare.prepare_voc(root, sbd, allow_partial=True)
  return root


@pytest.mark.parametrize("stages", [*full((("32s",),)), pytest.param(("32s", "16s", "8s"), marks=pytest.mark.slow)])
def test_fcn_on_voc_goes_from_32s_to_16s_to_8s(voc, tmp_path, capsys, stages):
  before = ""
  for stage in stages:
    config = recipe("fcn8_voc", voc, stage, num_steps=1, eval_every=1, checkpoint_every=1, crop_size=(50, 50))
    assert config.init.path == (f"runs/fcn{before[:2]}_voc" if before else "")
    config.init.path = str(tmp_path / before) if before else ""
    assert "val/iou/person" in train_and_evaluate(config, tmp_path / stage).scalars
    taken = {"32s": "scratch", "16s": "imported 32 of 34 tensors", "8s": "imported 34 of 36 tensors"}[stage]
    assert f"init: {taken}" in capsys.readouterr().out
    before = stage
  metrics = [json.loads(line) for line in (tmp_path / "32s/metrics.jsonl").read_text().splitlines()]
  assert metrics[0]["train/learning_rate"] == pytest.approx(1e-10 * 500 * 375, rel=1e-5)


def test_rates_for_a_mean_move_weights_as_the_papers_do_for_a_sum():
  """Caffe: v = m v + r (sum of gradients + d w). One step of each from the same gradients, in float64."""
  config = importlib.import_module("configs.fcn8_voc").get_config()
  pixels, w, gradient_sum = 500 * 375, 0.3, 4e5
  want = -1e-10 * (gradient_sum + 5e-4 * w)
  o = config.optimizer
  with jax.enable_x64(True):
    make = optimizer.make_optimizer(
      "sgd", lambda _: o.base_lr, momentum=o.momentum, nesterov=False, weight_decay=o.weight_decay, clip_norm=0.0
    )
    params = {"conv": {"kernel": np.float64(w)}}
    updates, _ = make.update({"conv": {"kernel": np.float64(gradient_sum / pixels)}}, make.init(params), params)
  assert float(updates["conv"]["kernel"]) == pytest.approx(want, rel=1e-12)


@pytest.mark.full
def test_fcn_on_cityscapes_trains_on_label_ids(tmp_path):
  archives.make_cityscapes(tmp_path)
  root = tmp_path / "data"
  prepare.unpack_cityscapes(tmp_path, root)
  config = recipe("fcn8_cityscapes", root, "at_once", num_steps=1, eval_every=1, checkpoint_every=1, crop_size=(32, 32))
  assert "val/iou/rider" in train_and_evaluate(config, tmp_path / "run").scalars


@pytest.mark.parametrize("name", ["fcn8_voc", "fcn8_cityscapes"])
def test_an_unknown_stage_lists_the_known_ones(name):
  with pytest.raises(
    ValueError, match=f"stage '4s': choose one of 32s, 16s, 8s, at_once, e.g. --config=configs/{name}.py"
  ):
    importlib.import_module(f"configs.{name}").get_config("4s")


@pytest.mark.parametrize(
  "name, argument", [("fcn8_kitti_road", None), ("fcn8_voc", "32s"), ("fcn8_voc", "at_once"), ("fcn8_cityscapes", None)]
)
def test_imagenet_weights_fit_what_the_recipe_excludes(name, argument):
  """torchvision's names, narrow: all of the backbone is taken and nothing else, and no name is left over."""
  config = recipe(name, "/data", argument)
  init = Experiment(config, num_classes=5).init
  variables = jax.eval_shape(init).variables()
  arrays = {}
  modules = {f"features.{n}": f"conv{conv}" for n, conv in torchvision.VGG_CONVS.items()}
  for module, ours in (modules | {"classifier.0": "fc6", "classifier.3": "fc7"}).items():
    h, w, inside, out = variables["params"]["backbone"][ours]["kernel"].shape
    flat = module.startswith("classifier")
    arrays[f"{module}.weight"] = np.ones((out, inside * h * w) if flat else (out, inside, h, w), np.float32)
    arrays[f"{module}.bias"] = np.ones(out, np.float32)
  arrays |= {"classifier.6.weight": np.ones((1000, 128), np.float32), "classifier.6.bias": np.ones(1000, np.float32)}
  loaded = pretrained.SCHEMES[config.init.scheme](arrays), "vgg16.pth"
  merged, line = warm_start.merge(variables, loaded, config.init.exclude)
  assert line.startswith("init: imported 30 of")
  new = {
    path[0].key
    for path, leaf in jax.tree_util.tree_flatten_with_path(merged["params"])[0]
    if isinstance(leaf, jax.ShapeDtypeStruct)
  }
  assert new == merged["params"].keys() - {"backbone"}
