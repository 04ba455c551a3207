"""Data that becomes unreadable during a run: how much of it a run tolerates, and that it stays repeatable."""

import json
import shutil

import jax
import numpy as np
import pytest

from segjax import input_pipeline
from segjax import train as train_lib
from segjax.config import IGNORE_LABEL, ConfigError
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, order
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.input_pipeline.sources.folder import FolderSource
from tests import fake_run
from tests.folder_of_images import folder_of_images
from tests.marks import full
from tests.test_train import assert_identical, checkpoint, read_metrics

LOADERS = ["tf_data", "grain"]


@pytest.fixture
def config(tiny_config, tmp_path):
  return folder_of_images(tiny_config, tmp_path / "data")


def rot(config, name, split="train"):
  """The header stays, the pixels are cut off."""
  path = f"{config.data.dir}/images/{split}/{name}.png"
  with open(path, "r+b") as file:
    file.truncate(200)


def read(config, bad, steps=3, border=False):
  """The batches, each read when it is asked for."""
  return input_pipeline.train_batches(
    input_pipeline.make_source(config.data, "train"),
    config.data,
    seed=0,
    batch_size=8,
    rows=np.arange(8),
    start_step=0,
    num_steps=steps,
    border=border,
    bad=bad,
  )


def batches(config, bad, steps=3, border=False):
  return list(read(config, bad, steps, border))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_bad_example_is_all_void_and_changes_no_other(config, tmp_path, capsys, loader):
  config.data.loader = loader
  sound = batches(config, None, border=True)
  rot(config, "05")
  bad = BadExamples(tmp_path, most=1)
  found = batches(config, bad, border=True)
  for before, after in zip(sound, found):
    np.testing.assert_array_equal(before["id"], after["id"])
    rows = before["id"] == 5
    for name in before:
      np.testing.assert_array_equal(before[name][~rows], after[name][~rows])
    assert (
      (after["label"][rows] == IGNORE_LABEL).all() and not after["size"][rows].any() and not after["image"][rows].any()
    )
  assert bad.count(3) == 1 and bad.count(0) == 0
  lines = [json.loads(line) for line in (tmp_path / "bad_examples_0.jsonl").read_text().splitlines()]
  places = [(step, row) for step in range(3) for row in np.flatnonzero(order.train_ids(0, step, 8, 12) == 5)]
  assert sorted((line["step"], line["row"], line["name"]) for line in lines) == [
    (*place, "images/train/05") for place in places
  ]
  assert "BAD EXAMPLE images/train/05, void in step" in capsys.readouterr().out and "05.png" in lines[0]["error"]


@pytest.mark.parametrize("loader", LOADERS)
def test_one_bad_example_too_many_stops_and_names_all(config, tmp_path, loader):
  config.data.loader = loader
  rot(config, "05")
  found = read(config, BadExamples(tmp_path, most=1))
  (tmp_path / "data/images/train/07.png").unlink()
  with pytest.raises(DataError, match=r"0[57].png: .*\nIt is bad example 2 \(the others: images/train/0[57]\)"):
    list(found)
  with pytest.raises(
    DataError, match=r"met 1 bad examples \(images/train/0[57]\), more than data.max_bad_examples = 0"
  ):
    BadExamples(tmp_path, most=0)


@pytest.mark.parametrize("loader", [*full("tf_data"), pytest.param("grain", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_examples_void_though_the_file_is_back(
  config, tmp_path, monkeypatch, capsys, loader
):
  """One read fails once, after the checkpoint of step 3 and before that of step 6."""
  config.data.loader, config.data.max_bad_examples = loader, 2
  load = input_pipeline.load_example

  def load_once(source, canvas_size, index, border=False):
    if index == 3 and len(source) == 12 and failing.pop(0):
      raise DataError("03.png: the file server is away. Restore it.")
    return load(source, canvas_size, index, border)

  reads = [n for n in range(6) for i in order.train_ids(config.seed, n, 8, 12) if i == 3]
  failing = [False] * 3 + [True]  # One read each epoch.
  assert len(reads) == 4 and reads[3] >= 3
  monkeypatch.setattr(input_pipeline, "load_example", load_once)
  train_lib.train(config, tmp_path / "run")
  assert not failing and "bad examples 1" in capsys.readouterr().out
  assert [line["train/bad_examples"] for line in read_metrics(tmp_path / "run") if "train/loss" in line][-1] == 1
  monkeypatch.undo()
  end = checkpoint(tmp_path / "run", 6)
  shutil.rmtree(tmp_path / "run/checkpoints/step_6")
  shutil.copytree(tmp_path / "run", tmp_path / "other")
  train_lib.train(config, tmp_path / "run")
  assert_identical(end, checkpoint(tmp_path / "run", 6))
  (tmp_path / "other/bad_examples_0.jsonl").unlink()  # That is what makes it so.
  train_lib.train(config, tmp_path / "other")
  with pytest.raises(AssertionError):
    assert_identical(end, checkpoint(tmp_path / "other", 6))


@pytest.mark.parametrize("cache", ["none", *full("device")])
def test_the_pass_of_init_unfold_obeys_the_same_rule_and_training_has_the_same_rows_void(config, tmp_path, cache):
  config.data.cache, config.mesh.data, config.model.depth = cache, 1, 1
  first = int(order.train_ids(config.seed, 0, 8, 12)[0])
  places = {
    (step, row) for step in (0, 1) for row in np.flatnonzero(order.train_ids(config.seed, step, 8, 12) == first)
  }
  rot(config, f"{first:02d}")
  experiment = Experiment(config)
  variables = jax.device_get(experiment.init_state().variables())
  for allowed in (None, BadExamples(tmp_path, most=0)):
    with pytest.raises(DataError, match=f"{first:02d}.png: damaged or truncated"):
      experiment._unfold(variables, allowed)
  new = experiment._unfold(variables, BadExamples(tmp_path, most=1))  # Two steps of 8 show the 12 images.
  assert np.isfinite(new["batch_stats"]["down0"]["norm1"]["var"]).all()
  bad = BadExamples(tmp_path, most=1)
  assert {(step, row) for step in range(3) for row in range(8) if (step, row) in bad} == places


def test_each_process_writes_its_own_and_all_are_counted(tmp_path):
  first, second = (BadExamples(tmp_path, most=2, process=n) for n in (0, 1))
  first.add(4, 7, "a", DataError("a.png: gone"))
  second.add(5, 8, "b", DataError("b.png: gone"))
  first.add(9, 8, "b", DataError("b.png: gone"))
  assert first.count(10) == second.count(6) == 2
  with pytest.raises(
    DataError, match=r"Example c, needed in step 7: c.png: gone\n.*bad example 3 \(the others: a, b\)"
  ):
    second.add(6, 9, "c", DataError("c.png: gone"))
  again = BadExamples(tmp_path, most=2)
  assert {(4, 7), (5, 8), (9, 8)} == {place for place in [(4, 7), (5, 8), (9, 8), (6, 9), (4, 8)] if place in again}


def test_a_line_cut_short_is_no_bad_example_and_other_text_is_named(tmp_path):
  path = tmp_path / "bad_examples_0.jsonl"
  path.write_text('{"step": 1, "row": 2, "name": "a", "error": ""}\n{"step": 1, "row"')
  assert BadExamples(tmp_path, most=1).count(2) == 1
  path.write_text("what?\n")
  with pytest.raises(DataError, match="bad_examples_0.jsonl: not a list of bad examples"):
    BadExamples(tmp_path, most=1)


def test_evaluation_stops_at_the_first_bad_example_whatever_is_allowed(config, tmp_path, monkeypatch):
  config.data.max_bad_examples = 5
  rot(config, "02", split="val")
  monkeypatch.setattr(Experiment, "make_train_step", lambda *weights: fake_run.Fake().step)
  with pytest.raises(DataError, match=r"val/02.png: damaged or truncated"):
    train_lib.train(config, tmp_path / "run")


def test_a_run_that_starts_with_other_examples_than_it_began_with_is_refused(config, tmp_path, monkeypatch):
  config.num_steps, fake_run.install(monkeypatch).scores = 1, [0.5]
  train_lib.train(config, tmp_path / "run")
  for folder in ("images", "masks"):
    shutil.move(f"{config.data.dir}/{folder}/train/03.png", f"{config.data.dir}/{folder}/train/13.png")
  config.num_steps = 2
  with pytest.raises(ConfigError, match="missing images/train/03; new images/train/13. Restore them"):
    train_lib.train(config, tmp_path / "run")


@pytest.mark.parametrize("loader", ["tf_data", pytest.param("grain", marks=pytest.mark.slow)])
def test_nan_in_a_batch_stops_with_the_batch_saved(config, tmp_path, monkeypatch, loader):
  """Images and labels are integers; the weights of border pixels are where a NaN can come in."""
  config.data.loader, config.loss.border_weight, config.log_every = loader, 10.0, 1
  source, border = FolderSource, FolderSource.border
  monkeypatch.setattr(source, "border", lambda self, i: border(self, i) + np.float16(np.nan if i == 3 else 0))
  first = next(n for n in range(6) if 3 in order.train_ids(config.seed, n, 8, 12))
  ids = order.train_ids(config.seed, first, 8, 12)
  with pytest.raises(train_lib.NonFiniteLoss, match=rf"not finite in step {first + 1} \(learning rate 0.0") as error:
    train_lib.train(config, tmp_path / "run")
  assert f"example ids {ids.tolist()}" in str(error.value)
  code = str(error.value).partition("batch = ")[2].partition(". Last good")[0]
  batch = eval(
    code, {"dict": dict, "numpy": np}
  )  # The line that the message gives; np.load takes no pickle by default.
  np.testing.assert_array_equal(batch["id"], ids)
  assert np.isnan(batch["border"]).any((1, 2)).tolist() == (ids == 3).tolist()
  opened = input_pipeline.make_source(config.data, "train")
  for row, index in enumerate(ids):
    np.testing.assert_array_equal(batch["image"][row], opened[index][0])
    np.testing.assert_array_equal(batch["label"][row], opened[index][1])
