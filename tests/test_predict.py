"""Predicting any images: the bits of evaluation, the rule of canvases, tiles without seams, and what goes wrong."""

import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from segjax import config as config_lib
from segjax import input_pipeline, predict, sharding
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, unlabelled
from segjax.run import pictures, prediction_info
from tests import command
from tests.marks import full
from tests.untrained_run import make_config, make_data, make_run, smooth

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return make_data(tmp_path_factory.mktemp("data"))


def evaluated(config, workdir):
  """{image's name: the step's outputs for it in an evaluation}."""
  source = input_pipeline.make_source(config.data, "val")
  experiment = Experiment(config, mesh=sharding.make_mesh(1))
  variables, _, _ = experiment.trained_variables(workdir, None)
  step = experiment.eval_step
  found = {}
  for batch in input_pipeline.eval_batches(source, config.data, batch_size=2, rows=np.arange(2)):
    out = jax.device_get(step(variables, jax.device_put(batch)))
    for row, (index, (h, w)) in enumerate(zip(batch["id"], batch["size"])):
      if index >= 0:
        name = pathlib.Path(source.describe(int(index))).name
        found[name] = {k: out[k][row, :h, :w] for k in ("prediction", "probability") if k in out}
  return found


def read(path):
  with Image.open(path) as image:
    return np.asarray(image)


FAMILIES = dict(
  unet=(dict(), dict(scales=(0.75, 1.0), flip=True)),
  unpadded_sigmoid=(dict(classes=2, width=4, depth=1, padding="valid", batch_norm=False), dict(threshold=0.45)),
  unpadded_tiles=(dict(width=4, depth=1, padding="valid"), dict(window=(16, 20), window_stride=(16, 20))),
  fcn=(dict(model="fcn", width=2), dict()),
  deeplab=(
    dict(model="deeplab_v3plus", classes=2, backbone="mobilenet_v2", output_stride=16, atrous_rates=(), decoder=False),
    dict(window=(33, 33), window_stride=(20, 20)),
  ),
)


@pytest.mark.parametrize("family", ["unet", *full(*(name for name in FAMILIES if name != "unet"))])
def test_predictions_are_those_of_evaluation_bit_for_bit(data, family, tmp_path):
  """All images or other batches, without the data set: classes, probabilities, whatever the protocol."""
  options, protocol = FAMILIES[family]
  config = make_config(data, **options)
  config.eval.update(protocol)
  if family == "unpadded_sigmoid":
    config.head = "sigmoid"
  workdir = make_run(config, tmp_path / "run")
  want = evaluated(config, workdir)
  assert len(np.unique(np.concatenate([out["prediction"].reshape(-1) for out in want.values()]))) > 1
  images = tmp_path / "images"
  shutil.copytree(data / "images/val", images)
  config.data.dir = str(tmp_path / "gone")
  assert predict.predict(config, workdir, [str(images)], tmp_path / "all") == []
  some = ("4", "2", "1")
  assert predict.predict(config, workdir, [str(images / f"{name}.png") for name in some], tmp_path / "some") == []
  for out, names in ((tmp_path / "all", want), (tmp_path / "some", some)):
    for name in names:
      np.testing.assert_array_equal(read(out / f"ids/{name}.png"), want[name]["prediction"])
      assert (out / f"probability/{name}.png").exists() == (config.data.classes == ("a", "b"))
      if "probability" in want[name]:
        np.testing.assert_array_equal(read(out / f"probability/{name}.png"), want[name]["probability"])


def test_a_threshold_cuts_the_probability(data, tmp_path):
  options, _ = FAMILIES["unpadded_sigmoid"]
  config = make_config(data, **options)
  config.head = "sigmoid"
  workdir, out = make_run(config, tmp_path / "run"), tmp_path / "out"
  for threshold in (0.2, 0.45):
    config.eval.threshold = threshold
    predict.predict(config, workdir, [str(data / "images/val")], out)
    ids, probability = (read(out / f"{kind}/1.png") for kind in ("ids", "probability"))
    assert 0.005 < ids.mean() < 0.995
    sure = np.abs(probability / 255 - threshold) > 0.003
    np.testing.assert_array_equal(ids[sure], (probability > 255 * threshold)[sure])


@pytest.mark.full
def test_what_is_written_shows_the_same_classes(data, tmp_path):
  """Palette image, overlay, classes.txt; of two classes the ground is left as it is and the other one green."""
  image = read(data / "images/val/1.png")
  for classes in (2, 3):
    workdir = make_run(make_config(data, classes=classes), tmp_path / f"run{classes}")
    config, out = config_lib.load(workdir), tmp_path / f"out{classes}"
    predict.predict(config, workdir, [str(data / "images/val/1.png")], out)
    ids, overlay = read(out / "ids/1.png"), read(out / "overlays/1.png")
    assert (out / "ids/classes.txt").read_text().split() == list("abc")[:classes] and len(np.unique(ids)) > 1
    with Image.open(out / "ids/1.png") as plain, Image.open(out / "colors/1.png") as colors:
      assert plain.mode == "L" and colors.mode == "P"
      np.testing.assert_array_equal(np.asarray(colors), ids)
      np.testing.assert_array_equal(np.asarray(colors.convert("RGB")), prediction_info.load(workdir).palette[ids])
    if classes == 2:
      np.testing.assert_array_equal(overlay[ids == 0], image[ids == 0])
      np.testing.assert_array_equal(overlay[ids == 1], (image[ids == 1].astype(int) + [0, 255, 0]) // 2)
    else:
      assert (overlay[ids == 1] != image[ids == 1]).any(-1).all()


def test_heat_rises_evenly_in_brightness():
  luma = pictures.heat_table() @ [0.30, 0.59, 0.11]
  np.testing.assert_allclose(luma, np.arange(256), atol=2)


def test_a_canvas_follows_from_the_images_own_size():
  assert unlabelled.canvas_for((300, 400), (360, 480), 1025) == (360, 480)
  assert unlabelled.canvas_for((361, 400), (360, 480), 1025) == (385, 449)
  assert unlabelled.canvas_for((513, 449), None, 1025) == (513, 449)
  assert unlabelled.canvas_for((6000, 8000), (360, 480), 1025) == (1025, 1025)
  assert unlabelled.canvas_for((6000, 300), (360, 480), 1025) == (1025, 321)
  assert unlabelled.canvas_for((1500, 8000), (1025, 2049), 1025) == (1025, 2049)


@pytest.mark.parametrize("canvas, stride, model_margin", [(1025, 16, 0), (1025, 16, 188), (129, 32, 0), (65, 4, 20)])
def test_tiles_keep_each_pixel_once_with_its_surroundings(canvas, stride, model_margin):
  margin = min(max(128, model_margin), canvas // 4)
  for size in (1, canvas, canvas + 1, 2 * canvas, 6007):
    parts = unlabelled.axis_parts(size, canvas, stride, model_margin)
    assert parts[0].keep_start == 0 and parts[-1].keep_stop == parts[-1].stop == size
    assert all(part.start % stride == 0 and part.stop - part.start <= canvas for part in parts)
    for part, after in zip(parts, parts[1:]):
      assert part.keep_stop == after.keep_start and part.keep_start < part.keep_stop
      assert after.keep_start - after.start >= margin and part.stop - part.keep_stop >= margin


@pytest.mark.full
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_large_image_in_tiles_is_as_if_it_were_whole(data, padding, tmp_path):
  """For a U-Net, whose tiles show all that a logit sees."""
  config = make_config(data, classes=2, width=4, depth=2, padding=padding)
  workdir = make_run(config, tmp_path / "run")
  Image.fromarray(smooth(7, (300, 200))).save(tmp_path / "large.png")
  whole, tiled = (tmp_path / name for name in ("whole", "tiled"))
  predict.predict(config, workdir, [str(tmp_path / "large.png")], whole)
  predict.predict(config, workdir, [str(tmp_path / "large.png")], tiled, tile=129)
  probabilities = [read(out / "probability/large.png").astype(int) for out in (whole, tiled)]
  assert np.ptp(probabilities[0]) > 20 and np.abs(np.diff(probabilities, axis=0)).max() <= 1
  assert (read(whole / "ids/large.png") != read(tiled / "ids/large.png")).mean() < 1e-3


@pytest.mark.full
def test_images_of_many_sizes_share_few_programs(data, tmp_path, monkeypatch):
  workdir = make_run(make_config(data, classes=2), tmp_path / "run")
  config = config_lib.load(workdir)
  (tmp_path / "images").mkdir()
  for n in range(12):
    Image.fromarray(smooth(n, (20 + 9 * n, 25 + 5 * n))).save(tmp_path / f"images/{n}.png")
  made, make_step = [], Experiment.make_eval_step
  monkeypatch.setattr(Experiment, "make_eval_step", lambda *args: made.append(make_step(*args)) or made[-1])
  assert predict.predict(config, workdir, [str(tmp_path / "images")], tmp_path / "out") == []
  assert len(list((tmp_path / "out/ids").glob("*.png"))) == 12
  assert made[0]._cache_size() == 4  # The evaluation's canvas, 65x65, 129x65 and 129x129.


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
  """A run of two classes whose data set is elsewhere."""
  config = make_config(data, classes=2)
  folder = tmp_path_factory.mktemp("runs") / "run"
  make_run(config, folder)
  config.data.dir = "/nowhere"
  config_lib.save(config, folder)
  return folder


def run_command(*arguments):
  """(exit code, all output) of `segjax predict`."""
  code, out, err = command.run("segjax.predict", *arguments, cwd=ROOT)
  return code, out + err


def test_bad_files_are_named_and_skipped(data, run, tmp_path):
  images = tmp_path / "images"
  shutil.copytree(data / "images/val", images / "deep")
  Image.fromarray(np.zeros((9, 9), np.uint16)).save(images / "bits.png")
  (images / "text.png").write_text("no image")
  (images / "notes.txt").write_text("not looked at")
  cut = (images / "deep/1.png").read_bytes()
  (images / "cut.png").write_bytes(cut[: len(cut) // 2])
  out = images / "results"  # A second call must not take these for images.
  for _ in range(2):
    code, output = run_command(
      "--workdir", run, images, images / "nosuch.jpg", f"--out={out}", "--config.eval.flip=True"
    )
    assert code == 1 and "4 file(s) skipped" in output and "flip True" in output and "notes.txt" not in output, output
    for name, reason in (
      ("bits", "more than 8 bits"),
      ("text", "not a readable image"),
      ("cut", "damaged or trunc"),
      ("nosuch", "no such file"),
    ):
      assert f"{name}." in output and reason in output, (name, output)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert names == {f"{kind}/deep/{n}.png" for kind in predict.KINDS for n in range(5)}


def test_mistakes_are_told_before_anything_is_predicted(data, run, tmp_path):
  config = config_lib.load(run)
  images = data / "images/val"

  def check(error, match, *, inputs=(images,), workdir=run, out=tmp_path / "out"):
    with pytest.raises(error, match=match):
      predict.predict(config, workdir, [str(path) for path in inputs], out)

  (tmp_path / "empty").mkdir()
  check(DataError, "empty: no images in this folder or below it", inputs=[images, tmp_path / "empty"])
  check(DataError, "None of the images can be used:\n.*nosuch.png: no such file", inputs=["nosuch.png"])
  other = tmp_path / "other"
  other.mkdir()
  Image.fromarray(smooth(0, (9, 9))).save(other / "1.jpg")
  check(DataError, r"val/1.png and .*other/1.jpg would both be written as 1.png", inputs=[images, other / "1.jpg"])
  (other / "ids").mkdir()
  shutil.copy(other / "1.jpg", other / "ids/1.png")
  check(ConfigError, "ids/1.png is one of the images and would be", inputs=[other / "ids/1.png"], out=other)
  check(ConfigError, "--out=.*1.jpg cannot be written", out=other / "1.jpg")
  check(ConfigError, "is not the workdir of a run", workdir=tmp_path)
  fresh = tmp_path / "fresh"
  shutil.copytree(run, fresh, ignore=shutil.ignore_patterns("step_*"))
  check(ConfigError, "fresh/checkpoints holds no checkpoint", workdir=fresh)
  assert not (tmp_path / "out/ids").exists()
  assert (
    len(unlabelled.find_photos([str(images), str(images / "1.png")], [], "refuse")[0]) == 5
  )  # Named twice, predicted once.


def test_the_task_must_be_that_of_the_checkpoint(run, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(run, copy)
  image = str(tmp_path / "image.png")
  Image.fromarray(smooth(0, (9, 9))).save(image)
  config = config_lib.load(copy)
  saved = (copy / prediction_info.INFO_FILE).read_text()
  (copy / prediction_info.INFO_FILE).write_text(
    saved.replace('"b"', '"b", "c"').replace('"800000"', '"800000", "FFFFFF"')
  )
  with pytest.raises(ConfigError, match="does not hold the state of this config"):
    predict.predict(config, copy, [image], tmp_path / "out")
  (copy / prediction_info.INFO_FILE).write_text(saved.replace('"b"', '"b", "c"'))
  with pytest.raises(ConfigError, match="2 colours for 3 classes.*repeat the run's training command"):
    predict.predict(config, copy, [image], tmp_path / "out")


def test_weights_and_runs_of_before_predict_where_the_config_names_the_classes(data, run, tmp_path, capsys):
  """From init.path without a workdir, with the other run's task; and from a workdir that has no task.json."""
  config, image = config_lib.load(run), str(data / "images/val/1.png")
  predict.predict(config, run, [image], tmp_path / "run")
  old = tmp_path / "old"
  shutil.copytree(run, old, ignore=shutil.ignore_patterns(prediction_info.INFO_FILE))
  capsys.readouterr()
  predict.predict(config, old, [image], tmp_path / "old_out")
  assert "note: no evaluation's canvas is known" in capsys.readouterr().out
  config.data.canvas_size = (48, 64)
  predict.predict(config, old, [image], tmp_path / "canvas")
  config.data.canvas_size = (0, 0)
  config.init.path = str(run)
  predict.predict(config, None, [image], tmp_path / "weights")
  assert f"from {run} (step 0)" in capsys.readouterr().out
  for out in ("canvas", "weights"):
    np.testing.assert_array_equal(read(tmp_path / out / "ids/1.png"), read(tmp_path / "run/ids/1.png"))


def test_sources_name_their_classes_without_any_data(tmp_path):
  for name, count, first in (("voc", 21, "background"), ("cityscapes", 19, "road"), ("synthetic", 6, "ground")):
    found = prediction_info.of_run(default_config(data=name), None)
    assert len(found.classes) == len(found.palette) == count and found.classes[0] == first
  config = default_config(data="folder")
  config.data.dir = str(tmp_path)
  with pytest.raises(DataError, match="The classes have no names: set data.classes"):
    prediction_info.of_run(config, None)


def test_the_command_says_what_it_lacks(tmp_path):
  for arguments, message in (
    (["--out=x", f"--workdir={tmp_path}", "a.png"], "is not the workdir of a run. Check --workdir"),
    (
      ["--out=x", "--config=configs/quickstart.py", "a.png"],
      "Name the --workdir of a run, or weights by --config.init",
    ),
  ):
    code, output = run_command(*arguments)
    assert code == 2 and message in output and "Traceback" not in output, output
  assert not os.path.exists(ROOT / "x")
