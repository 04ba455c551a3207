"""PASCAL VOC: from the archives to trainaug, labels as stored, and every mistake named."""

import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from segjax import metrics
from segjax.input_pipeline import DataError
from segjax.input_pipeline.sources import datasets, voc
from segjax.input_pipeline.sources.voc import VocSource
from segjax.tools import prepare
from tests import archives


@pytest.fixture
def devkit(tmp_path):
  """VOC2012 as unpacked, with trainaug made from SBD's archive."""
  archives.make_voc(tmp_path)
  root, sbd = prepare.unpack_voc(tmp_path, tmp_path / "data")
  prepare.prepare_voc(root, sbd, allow_partial=True)
  return root


def source(root, split="train", format="tree"):
  return VocSource(dir=str(root), split=split, format=format)


def names(data):
  return [data.describe(i) for i in range(len(data))]


def snapshot(root):
  return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


def test_trainaug_is_the_union_of_train_and_sbd_without_val(devkit):
  assert names(source(devkit, "trainaug")) == sorted(archives.TRAIN + archives.SBD_ONLY)
  assert {path.stem for path in (devkit / "SegmentationClassAug").iterdir()} == set(archives.SBD_ONLY)
  for split, want in (("train", archives.TRAIN), ("val", archives.VAL), ("trainval", archives.TRAIN + archives.VAL)):
    assert names(source(devkit, split)) == sorted(want)


def test_vocs_masks_keep_their_void_and_sbds_their_boundaries(devkit):
  data = source(devkit, "trainaug")
  for i, name in enumerate(names(data)):
    want = archives.voc_label(name) if name in archives.TRAIN else archives.sbd_label(name)
    np.testing.assert_array_equal(data[i][1], want)
    assert (data[i][1] == 255).any() == (name in archives.TRAIN)


def test_prepared_masks_are_palette_files_with_vocs_colours(devkit):
  with Image.open(devkit / "SegmentationClassAug" / f"{archives.SBD_ONLY[0]}.png") as file:
    assert file.mode == "P"
    np.testing.assert_array_equal(np.array(file.getpalette()).reshape(-1, 3)[:21], datasets.palette(21))


def test_indices_where_tensorflows_decoder_gives_colours(devkit):
  import tensorflow as tf

  path = voc.find_pairs(devkit, "train")[1][0][1]
  expanded = tf.io.decode_png(path.read_bytes(), channels=1).numpy()[..., 0]
  label = source(devkit)[0][1]
  assert set(np.unique(label)) <= {*range(21), 255} and (expanded[label == 1] == 38).all()
  assert (expanded[label == 255] == 220).all() and (expanded != label).any()


def test_running_again_writes_nothing(devkit, tmp_path):
  before = snapshot(tmp_path)
  root, sbd = prepare.unpack_voc(tmp_path, tmp_path / "data")
  prepare.prepare_voc(root, sbd, allow_partial=True)
  assert snapshot(tmp_path) == before


def test_an_interrupted_preparation_goes_on_and_leaves_no_half_files(devkit, tmp_path, monkeypatch):
  done, lost = (devkit / "SegmentationClassAug" / f"{name}.png" for name in archives.SBD_ONLY)
  lost.unlink()
  stamp = done.stat().st_mtime_ns
  monkeypatch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare_voc(devkit, tmp_path / "benchmark.tgz", allow_partial=True)
  assert not lost.exists() and not list(devkit.rglob("*.tmp"))
  monkeypatch.undo()
  prepare.prepare_voc(devkit, tmp_path / "benchmark.tgz", allow_partial=True)
  assert lost.exists() and done.stat().st_mtime_ns == stamp


def test_an_unpacked_sbd_gives_the_same(devkit, tmp_path):
  want = {path.name: path.read_bytes() for path in (devkit / "SegmentationClassAug").iterdir()}
  with tarfile.open(tmp_path / "benchmark.tgz") as archive:
    archive.extractall(tmp_path, filter="data")
  for path in (devkit / "SegmentationClassAug").iterdir():
    path.unlink()
  prepare.prepare_voc(devkit, tmp_path / "benchmark_RELEASE" / "dataset", allow_partial=True)
  assert {path.name: path.read_bytes() for path in (devkit / "SegmentationClassAug").iterdir()} == want


def test_other_counts_than_the_official_ones_are_refused_before_anything_is_written(tmp_path):
  archives.make_voc(tmp_path)
  root, sbd = prepare.unpack_voc(tmp_path, tmp_path)
  with pytest.raises(DataError, match="VOC train has 3 images, not 1464; VOC val has 2 images, not 1449"):
    prepare.prepare_voc(root, sbd)
  assert not (root / "SegmentationClassAug").exists() and not voc.list_file(root, "trainaug").exists()


def test_the_published_trainaug_list_is_train_and_sbd_without_val(shared):
  """Its arithmetic: 10582 ids, none of val, and SBD's 11355 images cover it but for VOC's own train."""
  read = {split: (shared / f"data/voc_lists/{split}.txt").read_text().split() for split in ("train_aug", "val", "test")}
  assert len(set(read["train_aug"])) == datasets.VOC_COUNTS["trainaug"] and not set(read["train_aug"]) & set(
    read["val"]
  )
  assert len(read["val"]) == datasets.VOC_COUNTS["val"] and len(read["test"]) == datasets.VOC_COUNTS["test"]
  assert not set(read["test"]) & set(read["train_aug"])


def test_the_published_list_comes_out_of_archives_of_its_size(shared, tmp_path, monkeypatch):
  """All ids of the published lists through prepare, with the reading of masks left out."""
  aug, val = ((shared / f"data/voc_lists/{name}.txt").read_text().split() for name in ("train_aug", "val"))
  train, sbd = aug[:1464], aug[1000:] + val[:773]  # 11355 images of SBD: it covers parts of train and val.
  assert len(sbd) + 1000 == 11355
  sbd += aug[:1000]
  (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
  for split, ids in (("train", train), ("val", val)):
    voc.list_file(tmp_path, split).write_text("\n".join(ids))
  monkeypatch.setattr(prepare, "_sbd_masks", lambda _: ((name, None) for name in sbd))
  monkeypatch.setattr(prepare, "_sbd_labels", lambda *_: np.zeros((1, 1), np.uint8))
  monkeypatch.setattr(voc, "find_pairs", lambda *_: None)
  prepare.prepare_voc(tmp_path, tmp_path)
  assert sorted(aug) == voc.read_list(tmp_path, "trainaug")
  assert len(list((tmp_path / "SegmentationClassAug").iterdir())) == 10582 - 1464


def test_the_test_split_has_images_and_no_labels(devkit):
  data = source(devkit, "test")
  assert names(data) == sorted(archives.TEST) and not data.labelled
  image, label = data[0]
  assert image.shape[:2] == label.shape == archives.size_of(archives.TEST[0]) and (label == 255).all()


def test_a_split_that_is_not_official_is_noted(devkit):
  assert source(devkit, "train").notes == ("split 'train' has 3 images, the official one 1464",)


def test_mean_iou_is_vocs_rule(devkit):
  """True positives over all pixels of label or prediction, void left out, per class (VOC devkit, VOCevalseg)."""
  data, rng = source(devkit, "trainval"), np.random.default_rng(0)
  total, hits, unions = 0, np.zeros(21), np.zeros(21)
  for i in range(len(data)):
    label = data[i][1]
    prediction = np.where(rng.random(label.shape) < 0.7, np.minimum(label, 20), rng.integers(0, 21, label.shape))
    total = total + np.asarray(metrics.confusion_matrix(label[None], prediction[None], 21)).astype(int)
    for k in range(21):
      hits[k] += ((label == k) & (prediction == k)).sum()
      unions[k] += (((label == k) | (prediction == k)) & (label != 255)).sum()
  assert metrics.scores(total)["mean_iou"] == pytest.approx((hits / unions).mean(), abs=1e-12)


def lose(root, path):
  (root / path).unlink()


def overwrite(root, path, text):
  (root / path).write_text(text)


def save(root, path, array):
  Image.fromarray(array).save(root / path)


@pytest.mark.parametrize(
  "damage, split, message",
  [
    (lambda r: lose(r, "JPEGImages/2007_000032.jpg"), "train", "1 are missing: JPEGImages/2007_000032.jpg"),
    (lambda r: lose(r, "SegmentationClass/2007_000033.png"), "val", "SegmentationClass/2007_000033.png"),
    (lambda r: lose(r, "SegmentationClassAug/2008_000002.png"), "trainaug", "Aug/2008_000002.png.*segjax.prepare voc"),
    (
      lambda r: lose(r, "ImageSets/Segmentation/trainaug.txt"),
      "trainaug",
      "trainaug.txt: no such list.*segjax.prepare",
    ),
    (lambda r: lose(r, "ImageSets/Segmentation/test.txt"), "test", "Unpack VOC2012test.tar"),
    (lambda r: overwrite(r, "ImageSets/Segmentation/val.txt", "\n"), "val", "the split 'val' is empty"),
    (lambda r: overwrite(r, "ImageSets/Segmentation/train.txt", "a\na\n"), "train", "lists a more than once"),
    (
      lambda r: overwrite(r, "ImageSets/Segmentation/trainaug.txt", "2007_000033"),
      "trainaug",
      "1 images of val: 2007_000033",
    ),
    (
      lambda r: save(r, "SegmentationClass/2007_000032.png", np.full((40, 40), 38, np.uint8)),
      "train",
      r"2007_000032.png: label values that do not belong here: 38 \(1600 px\). VOC's masks are palette",
    ),
    (lambda r: save(r, "SegmentationClass/2007_000032.png", np.zeros((40, 40, 3), np.uint8)), "train", "an RGB file"),
    (
      lambda r: save(r, "SegmentationClass/2007_000032.png", np.zeros((50, 40), np.uint8)),
      "train",
      "2007_000032.png is 50x40, but .*2007_000032.jpg is 40x40",
    ),
    (lambda r: None, "minival", "VOC has no split 'minival': choose one of train, val, trainval, trainaug, test"),
  ],
)
def test_mistakes_are_named(devkit, damage, split, message):
  damage(devkit)
  with pytest.raises(DataError, match=message):
    data = source(devkit, split)
    _ = data.canvas_size  # As training does first.
    _ = [data[i] for i in range(len(data))]


def test_roots_above_the_devkit_are_understood_and_wrong_ones_named(devkit, tmp_path):
  for root in (devkit, devkit.parent, devkit.parent.parent):
    assert len(source(root)) == 3
  with pytest.raises(DataError, match="no folder JPEGImages there"):
    source(tmp_path / "nowhere")


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda d: (d / prepare.VOC_TAR).unlink(), r"VOCtrainval_11-May-2012.tar: no such file. Download it from host"),
    (lambda d: (d / prepare.SBD_TGZ).unlink(), "benchmark.tgz: no such file"),
    (lambda d: (d / prepare.VOC_TAR).write_bytes((d / prepare.VOC_TAR).read_bytes()[:9000]), "VOCtrainval.*damaged"),
    (lambda d: (d / prepare.SBD_TGZ).write_bytes((d / prepare.SBD_TGZ).read_bytes()[:-900]), "benchmark.tgz|SBD's cls"),
    (lambda d: (d / "data").write_text("a file"), "data.* cannot be written"),
  ],
)
def test_damaged_archives_and_unwritable_folders_are_named(tmp_path, damage, message):
  archives.make_voc(tmp_path)
  damage(tmp_path)
  with pytest.raises(DataError, match=message):
    root, sbd = prepare.unpack_voc(tmp_path, tmp_path / "data")
    prepare.prepare_voc(root, sbd, allow_partial=True)
  assert not list(tmp_path.rglob("*.tmp"))


def test_a_devkit_that_cannot_be_written_is_named(tmp_path):
  archives.make_voc(tmp_path)
  root, sbd = prepare.unpack_voc(tmp_path, tmp_path)
  (root / "SegmentationClassAug").write_text("a file in the way")
  with pytest.raises(DataError, match="SegmentationClassAug cannot be written"):
    prepare.prepare_voc(root, sbd, allow_partial=True)


def test_an_archive_that_points_outside_is_refused(tmp_path):
  archives.make_voc(tmp_path)
  archives._tar(tmp_path / prepare.VOC_TAR, {"../outside.txt": b"x"}, "w")
  with pytest.raises(DataError, match="points outside"):
    prepare.unpack_voc(tmp_path, tmp_path / "data")
  assert not (tmp_path / "outside.txt").exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    ((), "Name one data set: voc or cityscapes"),
    (("voc",), "Give --archives=DIR, or --devkit"),
    (("cityscapes",), "Give --archives=DIR"),
    (("voc", "--archives=/nowhere"), "/nowhere/VOCtrainval_11-May-2012.tar: no such file"),
    (("voc", "--devkit=/nowhere", "--sbd=x"), "/nowhere: no folder JPEGImages"),
  ],
)
def test_the_command_line_says_what_it_needs(arguments, message):
  command = [sys.executable, "-m", "segjax.prepare", *arguments]
  result = subprocess.run(command, capture_output=True, text=True, check=False)
  assert result.returncode != 0 and message in result.stdout + result.stderr and "Traceback" not in result.stderr
