"""--mode=submit and --mode=eval in folders that hold something else, or cannot be written."""

import pytest

from segjax import config as config_lib
from segjax import evaluate, input_pipeline
from segjax.config import ConfigError, default_config
from segjax.tools import submission
from segjax.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a tiny run."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  config = default_config(data="synthetic")
  config.num_steps, config.batch_size, config.crop_size, config.data.loader = 1, 8, (8, 8), "grain"
  config.data.image_size, config.data.num_train, config.data.num_val = (8, 8), 4, 2
  config.model.width, config.model.depth = 2, 1
  train(config, workdir)
  return workdir


def test_predictions_replace_those_of_before_and_never_anything_else(run):
  config = config_lib.load(run)
  archive = submission.submit(config, run)
  first = sorted(path.relative_to(run) for path in archive.parent.rglob("*"))
  assert len(first) == 4 and submission.submit(config, run) == archive  # Two images in a folder, and their archive.
  assert sorted(path.relative_to(run) for path in archive.parent.rglob("*")) == first
  note = archive.parent / "results" / "notes.txt"
  note.write_text("mine")
  before = {path: path.stat().st_mtime_ns for path in archive.parent.rglob("*")}
  with pytest.raises(ConfigError, match="results/notes.txt is not one of them. Move it elsewhere"):
    submission.submit(config, run)
  assert {path: path.stat().st_mtime_ns for path in archive.parent.rglob("*")} == before
  note.unlink()
  (run / "predict_val.tmp").mkdir()  # Where an older segjax wrote, and deleted.
  (run / "predict_val.tmp/mine").touch()
  submission.submit(config, run)
  assert (run / "predict_val.tmp/mine").exists() and len(list(run.glob("predict_val*"))) == 2


def test_a_link_in_the_place_of_the_predictions_is_refused(run, tmp_path):
  config = config_lib.load(run)
  config.data.eval_split = "other"
  (tmp_path / "mine").touch()
  (run / "predict_other").symlink_to(tmp_path)
  with pytest.raises(ConfigError, match="predict_other is not one of them"):
    submission.submit(config, run)
  assert (tmp_path / "mine").exists()


@pytest.mark.parametrize("command", [train, evaluate.evaluate, submission.submit])
def test_whatever_reads_a_split_says_its_notes_before_anything_slow(run, capsys, monkeypatch, command):
  class Stop(Exception):
    pass

  def noted(data, split, *args):
    source = make_source(data, split, *args)
    source.notes = (f"split {split!r} is not complete",)
    return source

  def stop(*args):
    raise Stop(args)

  make_source = input_pipeline.make_source
  monkeypatch.setattr(input_pipeline, "make_source", noted)
  monkeypatch.setattr(input_pipeline.cache, "check_room", stop)
  with pytest.raises(Stop):
    command(config_lib.load(run), run)
  counts = "4 images in 'train', 2 images in 'val'" if command is train else "2 images in 'val'"
  out = capsys.readouterr().out
  assert f"data: {counts}, 6 classes, loader grain\n" in out and "note: split 'val' is not complete\n" in out
  assert ("split 'train'" in out) == (command is train)


def test_an_evaluation_that_cannot_write_prints_its_table_and_says_so(run, capsys):
  (run / "eval_val").touch()  # As in a folder that may only be read, which a superuser would not notice.
  scores = evaluate.evaluate(config_lib.load(run), run)
  out = capsys.readouterr().out
  assert "mean IoU" in out and f"NOT WRITTEN, scores and pictures in {run / 'eval_val'}" in out
  assert scores["val/mean_iou"] >= 0
