"""Experiment trackers, each with its own reader and without a network; what fails in one concerns no run."""

import importlib.util
import json
import struct
import time

import numpy as np
import pytest

from segjax import train as train_lib
from segjax.config import ConfigError, default_config, rules
from segjax.run import report, trackers
from tests import fake_run

PICTURE = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def needs(package):
  return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


def write(workdir, name, begin, later, lines):
  """A run, or its resumption from step `begin`, to `later`."""
  with trackers.Trackers((name,), {"optimizer.base_lr": 0.5}, workdir, lines.append) as tracked:
    writer = report.Writer(workdir, trackers=tracked, start_step=begin)
    writer.scalars(later, {"train/loss": later / 4, "val/iou/Void & (co)": 0.25, "val/iou/absent": float("nan")})
    writer.pictures(later, {"a/b": PICTURE})


@pytest.mark.full
@needs("mlflow")
def test_mlflow_has_config_curves_and_pictures_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
  from mlflow import MlflowClient

  uri, lines = f"sqlite:///{tmp_path / 'mlflow.db'}", []
  monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
  monkeypatch.chdir(tmp_path)  # The pictures go to ./mlruns.
  write(tmp_path / "run", "mlflow", 0, 2, lines)
  write(tmp_path / "run", "mlflow", 2, 4, lines)
  assert not lines
  client = MlflowClient(uri)
  (run,) = client.search_runs([client.get_experiment_by_name("segjax").experiment_id])
  assert run.info.run_id == (tmp_path / "run/mlflow.id").read_text() and run.info.status == "FINISHED"
  assert run.data.params == {"optimizer.base_lr": "0.5"} and run.info.run_name == "run"
  assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(2, 0.5), (4, 1)]
  assert run.data.metrics["val/iou/Void _ _co_"] == 0.25 and "val/iou/absent" not in run.data.metrics
  assert [file.path for file in client.list_artifacts(run.info.run_id, "overlays/step_000004")] == [
    "overlays/step_000004/a_b.png"
  ]


@pytest.mark.full
@needs("wandb")
def test_wandb_offline_writes_below_the_workdir_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  lines = []
  write(tmp_path / "run", "wandb", 0, 2, lines)
  write(tmp_path / "run", "wandb", 2, 4, lines)
  assert not lines
  id = (tmp_path / "run/wandb.id").read_text()
  files = sorted((tmp_path / "run/wandb").glob(f"offline-run-*/run-{id}.wandb"))
  assert len(files) == 2
  for file, step in zip(files, (2, 4)):
    items = history(file)
    assert {"step": step, "train/loss": step / 4, "val/iou/Void & (co)": 0.25}.items() <= items.items()
    assert items["overlays/a/b/_type"] == "image-file" and "val/iou/absent" not in items


def records(data):
  """The records of a file of W&B: LevelDB's log format (blocks of 32 KiB; crc, length, kind, bytes), behind 7 bytes."""
  place, whole = 7, b""
  while place + 7 <= len(data):
    if (left := 32768 - place % 32768) < 7:
      place += left
      continue
    length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
    if place + 7 + length > len(data):
      return  # It is being written.
    whole += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # A whole one, or the last part of one.
      yield whole
      whole = b""


def history(file):
  """All that the records say of steps. W&B's own process may write them after the run has finished."""
  from wandb.proto import wandb_internal_pb2

  found, end = [], time.monotonic() + 60
  while not any(record.WhichOneof("record_type") == "exit" for record in found):
    assert time.monotonic() < end, f"{file} has no end"
    found = [wandb_internal_pb2.Record.FromString(data) for data in records(file.read_bytes())]
  items = [item for record in found for item in record.history.item]
  return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class Failing:
  """Fails in the method that it is told to."""

  id, fails = "7", ""

  def __init__(self, config, workdir, id):
    self._call("start")

  def _call(self, name):
    if name == self.fails:
      raise RuntimeError("no route to host")

  def scalars(self, step, values):
    self._call("scalars")

  def pictures(self, step, pictures):
    self._call("pictures")

  def close(self, failed):
    self._call("close")


@pytest.mark.parametrize("method", ["start", "scalars", "pictures", "close"])
def test_a_tracker_that_fails_stops_no_run_and_is_named_once(tmp_path, monkeypatch, capsys, tiny_config, method):
  fake = fake_run.install(monkeypatch)
  fake.scores = [0.5, 0.6]
  monkeypatch.setattr(Failing, "fails", method)
  monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
  monkeypatch.setattr(trackers, "check", lambda names: None)
  tiny_config.trackers = ("wandb", "tensorboard")
  assert train_lib.train(tiny_config, tmp_path / "run") == {"val/mean_iou": 0.6, "val/iou/disk": 0.6}
  assert (
    capsys.readouterr().out.count("note: wandb gets nothing more of this run (RuntimeError: no route to host)") == 1
  )
  assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) > 3
  assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_a_tracker_that_is_misspelt_or_not_installed_is_refused_before_training(tmp_path, monkeypatch, tiny_config):
  config = default_config(data="synthetic")
  config.trackers = ("wanbd",)
  with pytest.raises(ConfigError, match=r"trackers.*choose of tensorboard, wandb, mlflow. Did you mean wandb\?"):
    rules.validate(config)
  tiny_config.trackers = ("tensorboard", "mlflow")
  monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else name)
  with pytest.raises(ConfigError, match=r"mlflow, whose package is not installed: pip install 'segjax\[mlflow\]'"):
    train_lib.train(tiny_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
