"""Cityscapes: label ids through the official table, scores equal to the official script, and every mistake named."""

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from segjax import metrics
from segjax.input_pipeline import DataError
from segjax.input_pipeline.sources import cityscapes, datasets
from segjax.input_pipeline.sources.cityscapes import CityscapesSource
from segjax.tools import prepare
from tests import archives


@pytest.fixture
def root(tmp_path):
  """The zips, unzipped."""
  archives.make_cityscapes(tmp_path)
  prepare.unpack_cityscapes(tmp_path, tmp_path / "data")
  return tmp_path / "data"


def source(root, split="train", format="tree", labels="gtFine"):
  return CityscapesSource(dir=str(root), split=split, format=format, labels=labels)


@pytest.fixture
def reference():
  """Tables and scores that cityscapesscripts 2.3.0 gave."""
  return np.load(pathlib.Path(__file__).parent / "data" / "cityscapes_eval.npz")


def test_the_id_table_is_cityscapesscripts(reference):
  table = [cityscapes.LABEL_MAP[label_id] for label_id in range(34)]
  np.testing.assert_array_equal(table, reference["id_to_trainid"][:34])
  ids = reference["labels_id_trainid_catid_hasinst_ignore"][:, 0].tolist()
  names = dict(zip(ids, reference["labels_names"].tolist()))
  colors = dict(zip(ids, reference["labels_color"].tolist()))
  for train_id, (name, label_id, color) in enumerate(datasets.CITYSCAPES):
    assert names[label_id] == name and reference["id_to_trainid"][label_id] == train_id
    assert colors[label_id] == datasets.parse_colors([color])[0].tolist(), name


def test_ids_become_classes_as_they_are_read_and_the_tree_stays(root):
  before = sorted(root.rglob("*"))
  data = source(root)
  assert [data.describe(i) for i in range(len(data))] == archives.cityscapes_names("train")
  image, label = data[0]
  ids = archives.cityscapes_ids(data.describe(0), (32, 64))
  assert set(np.unique(label)) == {*range(19), 255} and (image == ids[..., None] * 7).all()
  np.testing.assert_array_equal(label, np.vectorize(cityscapes.LABEL_MAP.get)(ids))
  assert sorted(root.rglob("*")) == before and len(source(root, "val")) == 2


def test_the_test_split_has_no_labels_even_where_dummies_lie_about(root):
  data = source(root, "test")
  assert (root / "gtFine/test").is_dir() and len(data) == 2 and not data.labelled and (data[0][1] == 255).all()


def test_coarse_labels_and_train_extra(root):
  shutil.copytree(root / "leftImg8bit/val", root / "leftImg8bit/train_extra")
  for path in (root / "gtFine/val").rglob("*_labelIds.png"):
    coarse = root / "gtCoarse/train_extra" / path.parent.name / path.name.replace("gtFine", "gtCoarse")
    coarse.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, coarse)
  data = source(root, "train_extra", labels="gtCoarse")
  assert len(data) == 2 and set(np.unique(data[0][1])) == {*range(19), 255}
  with pytest.raises(DataError, match="coarse labels only: set data.labels=gtCoarse"):
    source(root, "train_extra")


def test_what_is_missing_of_the_official_split_is_noted(root):
  assert source(root, "val").notes == (
    "split 'val' has 2 images, the official one 500",
    "split 'val' lacks the cities frankfurt, lindau",
  )


def rename_to_train_ids(root):
  for path in (root / "gtFine/train").rglob("*_labelIds.png"):
    path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))


def write_train_ids(root):
  for path in (root / "gtFine/train").rglob("*_labelIds.png"):
    ids = np.asarray(Image.open(path))
    Image.fromarray(np.vectorize(cityscapes.LABEL_MAP.get)(ids).astype(np.uint8)).save(path)


MASK = "gtFine/train/zurich/zurich_000000_000019_gtFine_labelIds.png"


@pytest.mark.parametrize(
  "damage, message",
  [
    (rename_to_train_ids, "holds _labelTrainIds.png but no _labelIds.png for 4 images.*unzip gtFine_trainvaltest.zip"),
    (write_train_ids, r"aachen_000000_000019_gtFine_labelIds.png: .* 255 \(\d+ px\).*look like train ids"),
    (
      lambda r: Image.fromarray(np.full((32, 64), 34, np.uint8)).save(r / MASK),
      r"zurich.*: .* 34 \(2048 px\).*ids are 0 to 33",
    ),
    (
      lambda r: Image.fromarray(np.zeros((16, 64), np.uint8)).save(r / MASK),
      "labelIds.png is 16x64, but .*leftImg8bit.png is 32x64",
    ),
    (lambda r: (r / MASK).write_bytes((r / MASK).read_bytes()[:60]), "zurich.*(damaged or truncated|not a readable)"),
    (lambda r: (r / MASK).unlink(), r"1 of 4 images have no \*_gtFine_labelIds.png \(zurich_000000_000019\)"),
    (lambda r: shutil.rmtree(r / "gtFine/train/zurich"), r"2 of 4 images have no .*\(cities without labels: zurich\)"),
    (lambda r: shutil.rmtree(r / "gtFine"), "gtFine/train: no such folder. Unzip gtFine_trainvaltest.zip in"),
    (
      lambda r: shutil.rmtree(r / "leftImg8bit"),
      "leftImg8bit/train: no such folder. Unzip leftImg8bit_trainvaltest.zip in",
    ),
    (
      lambda r: shutil.rmtree(r / "leftImg8bit/train/aachen") or shutil.rmtree(r / "leftImg8bit/train/zurich"),
      "so the split is empty",
    ),
    (lambda r: shutil.rmtree(r), "neither leftImg8bit nor gtFine is there"),
  ],
)
def test_mistakes_are_named(root, damage, message):
  damage(root)
  with pytest.raises(DataError, match=message):
    data = source(root)
    _ = data.canvas_size
    _ = [data[i] for i in range(len(data))]


def test_missing_and_damaged_zips_and_other_counts_are_named(tmp_path):
  archives.make_cityscapes(tmp_path)
  prepare.unpack_cityscapes(tmp_path, tmp_path)
  with pytest.raises(DataError, match="Cityscapes train has 4 images, not 2975; .*test has 2 images, not 1525"):
    prepare.check_cityscapes(tmp_path)
  prepare.check_cityscapes(tmp_path, allow_partial=True)
  path = tmp_path / "gtFine_trainvaltest.zip"
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(DataError, match="gtFine_trainvaltest.zip: damaged or not complete"):
    prepare.unpack_cityscapes(tmp_path, tmp_path / "again")
  path.unlink()
  with pytest.raises(DataError, match="gtFine_trainvaltest.zip: no such file"):
    prepare.unpack_cityscapes(tmp_path, tmp_path / "again")


def confusion_of(label, prediction):
  """19x19 counts of class ids through the project's own matrix."""
  return np.asarray(metrics.confusion_matrix(label[None], prediction[None], 19)).astype(np.int64)


def test_mean_iou_equals_the_official_scripts_on_stored_numbers(reference):
  total = 0
  for truth, prediction in zip(reference["gt"], reference["pred_19"]):
    total = total + confusion_of(cityscapes.to_label("truth", truth), cityscapes.to_label("prediction", prediction))
  np.testing.assert_array_equal(total, reference["19_trainid_confusion_19x20"][:, :19])
  scores = metrics.scores(total)
  assert scores["mean_iou"] == pytest.approx(float(reference["19_averageScoreClasses"]), abs=1e-9)
  np.testing.assert_allclose(scores["iou_per_class"], reference["19_trainid_iou"], atol=1e-9)


def test_mean_iou_equals_the_official_script_run_on_a_tree_with_all_ids(root, tmp_path, monkeypatch):
  """cityscapesscripts' own evaluation of a submission, live."""
  monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # It calls what NumPy 2.4 dropped.
  script = pytest.importorskip(
    "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", reason="pip install cityscapesscripts"
  )
  rng, total, data = np.random.default_rng(0), 0, source(root, "val")
  predictions, truths = [], []
  for i in range(len(data)):
    label = data[i][1]
    prediction = np.where(rng.random(label.shape) < 0.6, label, rng.integers(0, 19, label.shape)).astype(np.uint8)
    prediction[prediction == 255] = 0
    total = total + confusion_of(label, prediction)
    ids = np.array(data.submission.ids, np.uint8)[prediction]
    predictions.append(str(tmp_path / f"{data.describe(i)}{data.submission.suffix}"))
    Image.fromarray(ids).save(predictions[-1])
    truths += map(str, (root / "gtFine/val").rglob(f"{data.describe(i)}_gtFine_labelIds.png"))
  script.args.quiet, script.args.JSONOutput, script.args.evalInstLevelScore = True, False, False
  result = script.evaluateImgLists(predictions, truths, script.args)
  scores = metrics.scores(total)
  assert scores["mean_iou"] == pytest.approx(result["averageScoreClasses"], abs=1e-9)
  for name, iou in zip(data.classes, scores["iou_per_class"]):
    assert iou == pytest.approx(result["classScores"][name], abs=1e-9), name
