"""From archives to submissions, with both loaders and both formats; and real VOC images through every command."""

import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from segjax import evaluate as evaluate_lib
from segjax import input_pipeline, sharding
from segjax import train as train_lib
from segjax.config import default_config
from segjax.config import rules as config_rules
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, scan
from segjax.tools import browse, check_data, submission
from tests import archives, command
from tests.test_loaders import assert_same
from tests.test_train import assert_identical, checkpoint


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """{(data set, format): data.dir}, made by the command line of segjax.prepare from archives."""
  folder = tmp_path_factory.mktemp("archives")
  archives.make_voc(folder)
  archives.make_cityscapes(folder)
  for name in ("voc", "cityscapes"):
    arguments = f"--archives={folder}", f"--out={folder / name}", "--allow_partial", f"--tfds={folder / 'tfds'}"
    code, out, err = command.run("segjax.prepare", name, *arguments)
    assert code == 0 and "train on it: --config.data.dir=" in out, err
  return {
    ("voc", "tree"): folder / "voc/VOCdevkit/VOC2012",
    ("cityscapes", "tree"): folder / "cityscapes",
    ("voc", "tfds"): folder / "tfds",
    ("cityscapes", "tfds"): folder / "tfds",
  }


def tiny(name, stores, format="tree", loader="grain"):
  config = default_config(model="unet", data=name)
  config.num_steps, config.batch_size, config.crop_size = 2, 8, (16, 16)
  config.mesh.data, config.eval.num_overlays = 1, 1
  config.model.width, config.model.depth = 4, 1
  config.data.dir, config.data.format, config.data.loader = str(stores[name, format]), format, loader
  config.data.train_split = "trainaug" if name == "voc" else "train"
  config.data.canvas_size = (56, 56) if name == "voc" else (0, 0)
  config_rules.validate(config)
  return config


def batches(name, stores, split, format, loader):
  data = tiny(name, stores, format, loader).data
  source = input_pipeline.make_source(data, split, labels=False)
  return list(
    input_pipeline.train_batches(source, data, seed=1, batch_size=4, rows=np.arange(4), start_step=0, num_steps=3)
  )


@pytest.mark.parametrize(
  "name, split",
  [("voc", "trainaug"), ("voc", "trainval"), ("voc", "test"), ("cityscapes", "train"), ("cityscapes", "test")],
)
def test_batches_do_not_depend_on_format_or_loader(stores, name, split):
  first = batches(name, stores, split, "tree", "tf_data")
  for format, loader in (("tree", "grain"), ("tfds", "tf_data"), ("tfds", "grain")):
    assert_same(first, batches(name, stores, split, format, loader))


@pytest.mark.parametrize("name", ["voc", "cityscapes"])
def test_browse_shows_the_same_page_of_folders_and_of_shards(stores, name):
  pages = []
  for format in ("tree", "tfds"):
    config = tiny(name, stores, format)
    text, _, _ = browse.page(config, 9)
    pages.append(re.sub(r"<p class=.soft.>Note: .*|" + re.escape(config.data.dir), "", text))
  assert pages[0].count("<img") == 9 * 4 and pages[0] == pages[1]


def test_masks_keep_their_numbers_in_the_shards(stores):
  data = input_pipeline.make_source(tiny("voc", stores, "tfds").data, "val")
  for i, name in enumerate(sorted(archives.VAL)):
    assert data.describe(i) == name
    np.testing.assert_array_equal(data[i][1], archives.voc_label(name))


@pytest.mark.full
@pytest.mark.parametrize("name", ["voc", "cityscapes"])
def test_train_eval_and_submission(stores, name, tmp_path, capsys):
  """Both loaders and both formats: the same network, bit for bit, and files that hold the very argmax that is scored."""
  runs = dict(tree=tmp_path / "tree", tfds=tmp_path / "tfds")
  for (format, workdir), loader in zip(runs.items(), ("tf_data", "grain")):
    config = tiny(name, stores, format, loader)
    scores = train_lib.train(config, workdir)
    assert "note: split 'val' has 2 images, the official one" in capsys.readouterr().out
    assert evaluate_lib.evaluate(config, workdir)["val/mean_iou"] == scores["val/mean_iou"]
  assert_identical(*[{k: checkpoint(w, 2)[k] for k in ("params", "opt_state", "batch_stats")} for w in runs.values()])

  for split in ("test", "val"):
    config.data.eval_split = split
    archive = submission.submit(config, workdir)
    source = input_pipeline.make_source(config.data, split, labels=False)
    unpacked = tmp_path / split
    with tarfile.open(archive) if name == "voc" else zipfile.ZipFile(archive) as file:
      file.extractall(unpacked)
    found = {path.relative_to(unpacked).as_posix(): path for path in unpacked.rglob("*.png")}
    if name == "voc":
      assert archive == workdir / f"predict_{split}" / "results.tgz"
      assert found.keys() == {
        f"results/VOC2012/Segmentation/comp6_{split}_cls/{n}.png" for n in vars(archives)[split.upper()]
      }
    else:
      assert found.keys() == {f"results/{n}_labelIds.png" for n in archives.cityscapes_names(split)}
    experiment = Experiment(config, mesh=sharding.make_mesh(1))
    variables, _, _ = experiment.trained_variables(workdir, None)
    batch = next(input_pipeline.eval_batches(source, config.data, batch_size=8, rows=np.arange(8)))
    want = np.asarray(experiment.eval_step(variables, jax.device_put(batch))["prediction"])
    for i in range(len(source)):
      with Image.open(found[submission.result_path(source, i).as_posix()]) as image:
        assert image.mode == ("P" if name == "voc" else "L") and image.size == tuple(batch["size"][i][::-1])
        stored = np.asarray(image)
      h, w = batch["size"][i]
      ids = np.array(source.submission.ids, np.uint8)[want[i]] if name == "cityscapes" else want[i]
      np.testing.assert_array_equal(stored, ids[:h, :w])
    if name == "cityscapes":
      assert set(np.unique(stored)) <= set(source.submission.ids)
  assert not list(workdir.glob("*.tmp"))


def test_a_split_without_labels_is_refused_for_training_and_scoring(stores, tmp_path):
  config = tiny("voc", stores)
  config.data.eval_split = "test"
  with pytest.raises(
    DataError, match=r"'test' of voc has no public labels.*--mode=submit --config.data.eval_split=test"
  ):
    train_lib.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_shards_are_read_without_importing_tensorflow(stores):
  code = f"""
import sys
from segjax.input_pipeline.sources.voc import VocSource
data = VocSource(dir={str(stores["voc", "tfds"])!r}, split="trainaug", format="tfds")
assert len(data) == 5 and data[0][0].ndim == 3
assert not any(name.split(".")[0] in ("tensorflow", "jax") for name in sys.modules)
"""
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(dataset="oxford"), "TFDS's 'oxford' is not in data.dir"),
    (dict(split="tain"), "no split 'tain'; it has "),
    (dict(mask_feature="mask"), "no feature 'mask'; it has id, image, label"),
    (dict(dataset=""), "name a TFDS data set"),
    (dict(classes=("a", "b")), "label values outside the 2 classes"),
  ],
)
def test_any_tfds_data_set_can_be_named_and_mistakes_say_so(stores, options, message):
  config = default_config(data="tfds").data
  config.dir, config.dataset, config.mask_feature = str(stores["voc", "tfds"]), "voc_segmentation", "label"
  config.classes = tuple(map(str, range(21)))
  config.label_map = "20:255"
  data = input_pipeline.make_source(config, "train+sbd")
  assert len(data) == 5 and data.describe(0) == "train+sbd_000000" and 20 not in np.unique(data[0][1])
  split = options.get("split", "train")
  config.update({name: value for name, value in options.items() if name != "split"})
  with pytest.raises(
    DataError, match=message.replace("label values outside the 2 classes", "sends 20 to|outside the 2")
  ):
    data = input_pipeline.make_source(config, split)
    _ = [data[i] for i in range(len(data))]


def test_damaged_shards_are_named(stores, tmp_path):
  root = tmp_path / "tfds"
  shutil.copytree(stores["voc", "tfds"] / "voc_segmentation", root / "voc_segmentation")
  folder = next((root / "voc_segmentation").glob("*/dataset_info.json")).parent
  for path in folder.glob("segjax_index_*"):
    path.unlink()
  shard = next(folder.glob("*train.array_record*"))
  content = shard.read_bytes()
  shard.write_bytes(content[: len(content) // 2])
  data = tiny("voc", stores, "tfds").data
  data.dir = str(root)
  with pytest.raises(DataError, match="voc_segmentation.*train"):
    input_pipeline.make_source(data, "train")[0]


@pytest.mark.full
def test_real_voc_images_go_through_check_train_eval_and_predict(shared, tmp_path, capsys):
  """Palette masks of two sizes, in VOC's layout, whole images scored on the 513x513 canvas."""
  names = sorted(path.stem for path in (shared / "data/voc_samples/JPEGImages").glob("*.jpg"))
  (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
  for split in ("train", "val", "test"):
    (tmp_path / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names))
  for folder in ("JPEGImages", "SegmentationClass"):
    shutil.copytree(shared / "data/voc_samples" / folder, tmp_path / folder)
  config = importlib.import_module("configs.unet_voc").get_config()
  config.data.dir, config.data.train_split, config.data.loader = str(tmp_path), "train", "grain"
  config.num_steps, config.batch_size, config.crop_size, config.mesh.data = 1, 1, (32, 32), 1
  config.model.width, config.model.depth, config.eval.batch_size = 2, 1, 2

  # Only that some of the classes are in none of the 8 images, in both splits, and that these hold the same images.
  assert check_data.check(config) == 2 + 8
  output = capsys.readouterr().out
  assert "val: 8 examples" in output and "no pixel of" in output and "canvas" not in output
  assert "note: split 'val' has 8 images, the official one 1449" in output
  counts, _, problems = scan.scan(input_pipeline.make_source(config.data, "val"), range(8))
  assert not problems and counts.sum() == 7 * 513 * 513 + 334 * 500
  scores = train_lib.train(config, tmp_path / "run")
  assert evaluate_lib.evaluate(config, tmp_path / "run")["val/mean_iou"] == scores["val/mean_iou"]
  config.data.eval_split = "test"
  folder = submission.submit(config, tmp_path / "run").parent / "results/VOC2012/Segmentation/comp6_test_cls"
  for name in names:
    with Image.open(folder / f"{name}.png") as result, Image.open(tmp_path / f"JPEGImages/{name}.jpg") as image:
      assert result.size == image.size and np.asarray(result).max() < 21
