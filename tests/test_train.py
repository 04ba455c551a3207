"""Whole runs, through the functions and through the command line: scores, resume, refusal, divergence."""

import contextlib
import functools
import gzip
import io
import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from segjax import config as config_lib
from segjax import evaluate as evaluate_lib
from segjax import train as train_lib
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.run import prediction_info
from segjax.run.checkpoint import Checkpoints
from tests import command
from tests.conftest import ROOT, make_tiny_config
from tests.marks import full


def read_metrics(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def checkpoint(workdir, step):
  with Checkpoints(workdir, read_only=True) as checkpoints:
    return checkpoints.restore_on_host(step)


def assert_identical(first, second):
  paths = jax.tree_util.tree_flatten_with_path(first)[0]
  other = dict(jax.tree_util.tree_flatten_with_path(second)[0])
  assert len(paths) == len(other) > 50
  for path, value in paths:
    np.testing.assert_array_equal(value, other[path], err_msg=jax.tree_util.keystr(path))


def arguments(config, workdir) -> tuple[str, str]:
  """Of a command, with a config file that holds `config`."""
  folder = workdir.with_name(workdir.name + "_config")
  folder.mkdir(exist_ok=True)
  config_lib.save(config, folder)
  return f"--config={config_lib.__file__}:{folder}", f"--workdir={workdir}"


def start(config, workdir, *more):
  """A run in a process of its own, from a config file that holds `config`."""
  line = [sys.executable, "-m", "segjax.main", *arguments(config, workdir), *more]
  return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
  output = process.communicate(timeout=300)[0]
  assert process.returncode == 0, output
  return output


class Finished(NamedTuple):
  workdir: pathlib.Path
  scores: dict
  output: str

  def copy(self, folder):
    return shutil.copytree(self.workdir, folder)


@functools.cache
def finished(loader: str) -> Finished:
  """The tiny run with either loader, trained once; tests that write into its workdir take a copy."""
  config = make_tiny_config()
  config.data.loader = loader
  workdir, output = pathlib.Path(FOLDER.name) / loader, io.StringIO()
  with contextlib.redirect_stdout(output):
    scores = train_lib.train(config, workdir)
  return Finished(workdir, scores, output.getvalue())


FOLDER = tempfile.TemporaryDirectory()


@pytest.mark.parametrize("loader", [*full("tf_data"), "grain"])
def test_six_steps_equal_three_a_kill_and_three_more_bit_for_bit(tiny_config, tmp_path, loader):
  """Parameters, statistics, optimiser state and averages, with augmentation and dropout on; loss and data as well."""
  tiny_config.data.loader = loader
  whole, broken = finished(loader).workdir, tmp_path / "broken"
  process = start(tiny_config, broken)
  while not (broken / "checkpoints" / "step_3").exists():  # Complete: Orbax renames it into place.
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  scores = train_lib.train(tiny_config, broken)
  assert_identical(checkpoint(whole, 6), checkpoint(broken, 6))
  strip = ("train/images_per_s", "train/step_time_ms", "train/data_wait_share")
  lines = [[{k: v for k, v in line.items() if k not in strip} for line in read_metrics(w)] for w in (whole, broken)]
  assert lines[0][-1] == lines[1][-1] and scores
  assert [line["step"] for line in lines[0] if "val/mean_iou" in line] == [3, 6]
  assert [line["step"] for line in lines[1] if "val/mean_iou" in line] == [3, 6]


def test_loaders_train_the_same_network_bit_for_bit():
  assert_identical(*(checkpoint(finished(loader).workdir, 6) for loader in ("tf_data", "grain")))


def test_a_run_leaves_scores_pictures_and_a_config(tiny_config, tmp_path, capsys):
  workdir, tiny_config.data.loader = finished("grain").copy(tmp_path / "run"), "grain"
  for text in (
    "step      6/6",
    "images/s",
    "data wait",
    "ETA",
    "mean IoU",
    "class ",
    "disk",
    "checkpoints",
    "overlays",
  ):
    assert text in finished("grain").output, text
  lines = read_metrics(workdir)
  names = set().union(*lines)
  assert {"step", "train/loss", "train/images_per_s", "train/learning_rate", "val/mean_iou", "val/iou/disk"} <= names
  assert lines[-1]["val/mean_iou"] == finished("grain").scores["val/mean_iou"]
  pictures = sorted((workdir / "overlays" / "step_000006").glob("*.png"))
  assert len(pictures) == 2 and Image.open(pictures[0]).size == (3 * 32, 24)
  assert config_lib.fields(config_lib.load(workdir)) == config_lib.fields(tiny_config)
  assert any(workdir.glob("events.out.tfevents*"))
  found = prediction_info.load(workdir)
  assert found.classes[1] == "disk" and len(found.palette) == 6 and found.canvas_size == (24, 32)

  # Again: complete, and how to go on.
  assert train_lib.train(tiny_config, workdir) == {}
  output = capsys.readouterr().out
  assert "this run is complete (6 of 6 steps" in output and "--config.num_steps" in output and "--mode=eval" in output

  # Longer: goes on from step 6.
  tiny_config.num_steps = 8
  train_lib.train(tiny_config, workdir)
  output = capsys.readouterr().out
  assert "resumed" in output and "at step 6" in output and "note: num_steps 6 -> 8" in output

  # Another config: refused, with the fields.
  tiny_config.optimizer.base_lr = 0.5
  with pytest.raises(ConfigError, match="optimizer.base_lr: 0.01 -> 0.5"):
    train_lib.train(tiny_config, workdir)


def test_evaluation_repeats_the_score_and_takes_any_split(tiny_config, tmp_path):
  workdir, scores = finished("grain").copy(tmp_path / "run"), finished("grain").scores
  tiny_config.data.loader, tiny_config.eval.checkpoint = "grain", "last"
  again = evaluate_lib.evaluate(tiny_config, workdir)
  assert again == scores or {k: v for k, v in again.items() if v == v} == {k: v for k, v in scores.items() if v == v}
  code, out, err = command.run(
    "segjax.main", *arguments(tiny_config, workdir), "--mode=eval", "--config.data.eval_split=train"
  )
  assert code == 0 and "train: 20 images, checkpoint of step" in out, err
  assert (workdir / "eval_train" / "metrics.jsonl").exists()
  # Without --config, the run's own.
  code, out, err = command.run("segjax.main", f"--workdir={workdir}", "--mode=eval", "--config.eval.scales=0.5,1.0")
  assert code == 0 and "scales (0.5, 1.0)" in out, err


@pytest.mark.full
def test_no_library_writes_notes_around_the_table_of_an_evaluation(tmp_path):
  workdir = finished("tf_data").copy(tmp_path / "run")
  line = [sys.executable, "-m", "segjax.main", f"--workdir={workdir}", "--mode=eval", "--config.eval.scales=0.5,1.0"]
  result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0 and "scales (0.5, 1.0)" in result.stdout, result.stderr
  assert result.stderr == ""


def test_eval_batch_size_does_not_change_the_score(tiny_config, tmp_path):
  workdir = finished("grain").copy(tmp_path / "run")
  tiny_config.data.loader, tiny_config.eval.checkpoint, tiny_config.eval.batch_size = "grain", "last", 16
  again = evaluate_lib.evaluate(tiny_config, workdir)["val/mean_iou"]
  assert finished("grain").scores["val/mean_iou"] == pytest.approx(again, abs=1e-6)  # Of batches of 8.


def test_steps_are_compiled_once_over_epochs_and_evaluations(tiny_config, tmp_path, monkeypatch, caplog):
  tiny_config.data.loader, tiny_config.eval_every = "grain", 2  # 20 examples, 8 a step: more than two epochs.
  with jax.log_compiles(True), caplog.at_level(logging.WARNING):
    train_lib.train(tiny_config, tmp_path / "run")
  compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
  for name in ("train_step", "eval_step"):
    assert sum(f"jit({name})" in message or f"Compiling {name}" in message for message in compiled) == 1, compiled


@pytest.mark.full
def test_a_run_keeps_what_it_compiled_and_traces_the_steps_it_is_told_to(tiny_config, tmp_path, monkeypatch):
  tiny_config.num_steps, tiny_config.model.depth, tiny_config.data.loader = 3, 1, "grain"
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  cache = tmp_path / "segjax/compilation"
  output = finish(start(tiny_config, tmp_path / "a", "--config.profile_steps=2,3"))
  assert f"profile of the steps 2 to 3: {tmp_path / 'a' / 'profile'}" in output
  (trace,) = (tmp_path / "a/profile").glob("**/perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert {int(event["args"]["step_num"]) for event in events if event.get("name") == "train"} == {2, 3}
  assert list((tmp_path / "a/profile").glob("**/*.xplane.pb"))  # What TensorBoard reads.
  # Of others, which take about as long as JAX thinks worth keeping, the machine's load decides.
  steps = {path.name for path in cache.glob("*_step-*-cache")}
  assert any("train_step" in name for name in steps), steps
  finish(start(tiny_config, tmp_path / "b"))
  assert {path.name for path in cache.glob("*_step-*-cache")} == steps
  assert not (tmp_path / "b/profile").exists()


def test_divergence_stops_the_run_names_it_and_keeps_the_last_good_checkpoint(tiny_config, tmp_path):
  tiny_config.num_steps, tiny_config.checkpoint_every, tiny_config.eval_every = 12, 3, 12
  tiny_config.data.loader = "grain"
  tiny_config.optimizer.base_lr, tiny_config.optimizer.warmup_steps = 1e38, 4  # Rates 0, 2.5e37, 5e37, ...
  tiny_config.optimizer.ema_decay = 0.0
  with pytest.raises(train_lib.NonFiniteLoss) as error:
    train_lib.train(tiny_config, tmp_path / "run")
  message = str(error.value)
  assert "not finite in step" in message and "learning rate" in message and "example ids [" in message
  failed = int(message.split("in step ")[1].split()[0])
  last = Checkpoints(tmp_path / "run", read_only=True).latest_step()
  assert last is None or last < failed
  for line in read_metrics(tmp_path / "run"):
    assert line["step"] < failed + tiny_config.log_every


def test_foreign_or_unwritable_workdirs_are_refused(tiny_config, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ConfigError, match="is not empty and holds no config.json"):
    train_lib.train(tiny_config, tmp_path)
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot be written"):
    train_lib.train(tiny_config, tmp_path / "file" / "run")


@pytest.mark.full
def test_warm_start_takes_weights_strictly_but_for_what_is_excluded(tiny_config, tmp_path, capsys):
  train_lib.train(tiny_config, tmp_path / "first")
  tiny_config.num_steps, tiny_config.init.path = 1, str(tmp_path / "first")
  train_lib.train(tiny_config, tmp_path / "second")
  assert "init: imported 56 of 56 tensors" in capsys.readouterr().out
  tiny_config.model.depth = 3
  with pytest.raises(ConfigError, match="only in the model: .*down3"):
    train_lib.train(tiny_config, tmp_path / "third")
  tiny_config.model.depth, tiny_config.model.width = 2, 8
  with pytest.raises(ConfigError, match=r"params/down0/conv1/kernel: the model has \(3, 3, 3, 8\)"):
    train_lib.train(tiny_config, tmp_path / "fourth")
  tiny_config.model.width, tiny_config.init.exclude = 4, ("logits", "nonsense")
  with pytest.raises(ConfigError, match="no parameter of the model matches 'nonsense'"):
    train_lib.train(tiny_config, tmp_path / "fifth")
  tiny_config.init.exclude = ("logits",)
  train_lib.train(tiny_config, tmp_path / "sixth")
  assert "init: imported 54 of 56 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_k_checkpoints_and_the_best_are_kept(tiny_config, tmp_path, keep):
  from segjax import state

  init = Experiment(tiny_config, num_classes=6).init
  current = state.materialize(init, None)
  checkpoints = Checkpoints(tmp_path, keep)
  for step, score in ((1, 0.2), (2, 0.9), (3, None), (4, 0.3), (5, None)):
    current.step = jax.numpy.asarray(step)
    checkpoints.save(current, score)
  checkpoints.wait()
  assert checkpoints.best_step() == 2 and checkpoints.best_score() == 0.9
  kept = sorted(int(p.name.removeprefix("step_")) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == sorted({2, *range(6 - keep, 6)})
  checkpoints.close()


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_restores_on_any_number_of_devices(tiny_config, tmp_path, devices):
  from segjax import sharding, state

  tiny_config.mesh.data = 8
  train_lib.train(tiny_config, tmp_path / "run")
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  init = Experiment(tiny_config, num_classes=6).init
  abstract = state.with_sharding(jax.eval_shape(init), sharding.replicated(mesh))
  checkpoints = Checkpoints(tmp_path / "run", read_only=True)
  restored = checkpoints.restore(abstract, 6)
  assert int(restored.step) == 6 and len(restored.params["logits"]["kernel"].sharding.device_set) == devices
  assert_identical(
    checkpoint(tmp_path / "run", 6)["params"] | {"x": checkpoint(tmp_path / "run", 6)["opt_state"]},
    restored.params | {"x": checkpoint(tmp_path / "run", 6)["opt_state"]},
  )
