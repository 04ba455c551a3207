"""What a run survives and how it goes on, with a step that only counts and evaluations that give what a test says."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from segjax import steps
from segjax import train as train_lib
from segjax.config import ConfigError
from segjax.input_pipeline import DataError
from segjax.run import checkpoint as checkpoint_lib
from segjax.run import distributed, report
from segjax.run.checkpoint import Checkpoints
from segjax.run.workdir import WorkdirError
from tests import fake_run
from tests.marks import full
from tests.test_train import assert_identical, checkpoint, read_metrics


@pytest.fixture
def fake(monkeypatch):
  return fake_run.install(monkeypatch)


@pytest.fixture
def config(tiny_config):
  """Two evaluations, at steps 3 and 6, under a plateau policy."""
  tiny_config.data.loader = "grain"  # Which imports no TensorFlow.
  tiny_config.optimizer.schedule = "constant"
  tiny_config.policy.plateau_factor, tiny_config.policy.plateau_patience = 0.5, 1
  return tiny_config


def scored(workdir):
  return [(line["step"], line["val/mean_iou"]) for line in read_metrics(workdir) if "val/mean_iou" in line]


def rates(workdir):
  return {line["step"]: line["train/learning_rate"] for line in read_metrics(workdir) if "train/loss" in line}


def test_the_evaluation_is_compiled_before_the_first_step(config, fake, tmp_path):
  fake.scores = [0.5, 0.6]
  train_lib.train(config, tmp_path / "run")
  assert fake.events[:2] == ["compile", ("step", 1)] and fake.events.count("compile") == 1


def test_a_failing_evaluation_loses_no_step_and_the_run_ends_as_if_it_had_not_failed(config, fake, tmp_path):
  config.num_steps, config.eval_every, config.checkpoint_every = 6, 2, 100
  scores = [0.5, 0.4, 0.3]
  fake.scores = list(scores)
  train_lib.train(config, tmp_path / "whole")
  fake.events.clear()
  for failure, expected in ((DataError("val/07.png is cut short"), DataError), (MemoryError("no room"), MemoryError)):
    fake.scores = [scores[0], failure] if not fake.events else [failure]
    with pytest.raises(expected) as error:
      train_lib.train(config, tmp_path / "broken")
    text = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert str(failure) in text and "the checkpoint of step 4 is complete" in text and "same command" in text
    assert "eval_every" in text and "eval.batch_size" in text
  fake.scores = scores[1:]
  assert train_lib.train(config, tmp_path / "broken")
  assert [event[1] for event in fake.events if event[0] == "step"] == [1, 2, 3, 4, 5, 6]
  assert_identical(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "broken", 6))
  assert rates(tmp_path / "broken") == rates(tmp_path / "whole") and rates(tmp_path / "whole")[6] < 0.01
  assert scored(tmp_path / "broken") == scored(tmp_path / "whole") == [(2, 0.5), (4, 0.4), (6, 0.3)]


def test_a_run_that_died_before_its_score_was_recorded_evaluates_again_and_tells_it_once(
  config, fake, tmp_path, monkeypatch, capsys
):
  def dies(score, folder):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_lib.Score, "write", dies)
    fake.scores = [0.5]
    with pytest.raises(KeyboardInterrupt):
      train_lib.train(config, tmp_path / "run")
  assert scored(tmp_path / "run") == [(3, 0.5)]
  fake.scores = [0.5, 0.6]
  train_lib.train(config, tmp_path / "run")
  assert scored(tmp_path / "run") == [(3, 0.5), (6, 0.6)] and not fake.scores
  assert "note: the evaluation at step 3 failed or was cut short before" in capsys.readouterr().out
  assert train_lib.train(config, tmp_path / "run") == {}


def test_class_weights_by_rule_are_cached_and_by_list_checked(config, fake, tmp_path):
  config.num_steps, config.loss.class_weights, fake.scores = 1, ("median_frequency",), [0.5]
  train_lib.train(config, tmp_path / "run")
  cached = json.loads((tmp_path / "run" / "label_statistics.json").read_text())
  assert len(cached["pixels"]) == 6 and cached["pixels"][0] > cached["pixels"][1] > 0
  assert fake.class_weights.shape == (6,) and fake.class_weights[0] < fake.class_weights[1]
  config.loss.class_weights = (1.0, 2.0)
  with pytest.raises(ConfigError, match="has 2 numbers for 6 classes"):
    train_lib.train(config, tmp_path / "other")


def test_a_picture_that_cannot_be_written_is_named_and_the_others_are_written(tmp_path, capsys):
  writer = report.Writer(tmp_path)
  (tmp_path / "overlays/step_000003/a.png").mkdir(parents=True)  # Where the first one would be written.
  folder = writer.pictures(3, {name: np.zeros((2, 2, 3), np.uint8) for name in "ab"})
  assert (folder / "b.png").is_file() and "note: no picture of 'a'" in capsys.readouterr().out


def test_an_evaluation_only_a_shorter_run_makes_changes_no_learning_rate(config, fake, tmp_path):
  config.num_steps, config.eval_every, config.checkpoint_every = 7, 2, 100
  fake.scores = [0.5, 0.4, 0.3, 0.2]
  train_lib.train(config, tmp_path / "whole")
  config.num_steps, fake.scores = 3, [0.5, 0.1]
  train_lib.train(config, tmp_path / "broken")
  config.num_steps, fake.scores = 7, [0.4, 0.3, 0.2]
  train_lib.train(config, tmp_path / "broken")
  assert rates(tmp_path / "broken") == {3: rates(tmp_path / "broken")[3]} | rates(tmp_path / "whole")
  assert_identical(checkpoint(tmp_path / "whole", 7), checkpoint(tmp_path / "broken", 7))


@pytest.mark.parametrize("field, value", [("eval_every", 1), *full(("data.eval_split", "train"), ("eval.flip", True))])
def test_policies_count_anew_and_best_is_not_compared_after_a_change_of_what_they_go_by(
  config, fake, tmp_path, capsys, field, value
):
  config.num_steps, config.eval_every, config.keep_checkpoints = 4, 2, 1
  fake.scores = [0.9, 0.8]
  train_lib.train(config, tmp_path / "run")  # The second evaluation halves the rate.
  section, _, leaf = field.rpartition(".")
  (config[section] if section else config)[leaf] = value
  config.num_steps, fake.scores = 6, [0.2] * 2
  train_lib.train(config, tmp_path / "run")
  output = capsys.readouterr().out
  assert "count again from step 4, the learning rate stays at 0.5 times" in output
  memory = checkpoint(tmp_path / "run", 6)["policy"]
  assert memory["best"] == (np.float32(0.2) if field == "eval_every" else -np.inf)  # Before its own evaluation.
  with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
    if field == "eval_every":
      assert checkpoints.best_step() == 2 and checkpoints.best_score() == 0.9
    else:
      assert checkpoints.best_step() == 6 and checkpoints.best_score() == 0.2
      assert f"the best so far, step 2, was measured otherwise ({field}: " in output


def test_where_nothing_goes_by_scores_a_change_of_evaluations_is_not_commented(config, fake, tmp_path, capsys):
  config.policy.plateau_factor = 1.0
  fake.scores = [0.9, 0.8]
  train_lib.train(config, tmp_path / "run")
  config.num_steps, config.eval_every, fake.scores = 8, 4, [0.7]
  train_lib.train(config, tmp_path / "run")
  assert "count again" not in capsys.readouterr().out


def test_an_undefined_score_neither_becomes_nor_deletes_the_best(config, fake, tmp_path, capsys):
  config.eval_every, config.keep_checkpoints = 2, 1
  fake.scores = [0.9, float("nan"), float("nan")]
  train_lib.train(config, tmp_path / "run")
  assert "val/mean_iou has no value here" in (output := capsys.readouterr().out) and "best mean_iou 90.00 %" in output
  with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
    assert checkpoints.best_step() == 2 and checkpoints.latest_step() == 6
    assert np.isnan(checkpoints.score(6).value)
  assert train_lib.train(config, tmp_path / "run") == {}  # Undefined, but evaluated.


class Full:
  """A log that takes the first line, and no more."""

  def __init__(self, error):
    self.error, self.lines = error, []

  def write(self, text):
    if self.lines:
      raise self.error
    self.lines.append(text)

  def flush(self):
    pass


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_a_run_whose_output_nobody_takes_goes_on_to_its_end(config, fake, tmp_path, monkeypatch, error):
  fake.scores = [0.5, 0.6]
  for name in ("stdout", "stderr"):
    monkeypatch.setattr(sys, name, Full(error))
  assert train_lib.train(config, tmp_path / "run")
  assert isinstance(sys.stdout, Full) and scored(tmp_path / "run") == [(3, 0.5), (6, 0.6)]


def test_what_cannot_be_written_leaves_exit_code_0():
  code = """
import sys
from segjax.run import streams
with streams.lasting_output():
  print("lost" * 10_000, flush=True)
  print("shown \\u00fc", file=sys.stderr)
"""
  with open("/dev/full", "w") as full:
    environ = os.environ | dict(PYTHONIOENCODING="ascii:strict")
    result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=environ, check=False)
  assert result.returncode == 0 and b"stdout could not be written ([Errno 28]" in result.stderr, result.stderr


@pytest.mark.parametrize("what", ["removed", "emptied", "moved"])
def test_a_workdir_that_is_gone_is_named_as_that(config, fake, tmp_path, what):
  workdir = tmp_path / "run"

  def go(n):
    if n == 5:
      workdir.rename(tmp_path / "elsewhere") if what == "moved" else shutil.rmtree(workdir)
      if what == "emptied":
        workdir.mkdir()

  fake.at_step, fake.scores = go, [0.5]
  with pytest.raises(WorkdirError, match="was removed, moved or emptied during the run") as error:
    train_lib.train(config, workdir)
  assert "Free space" not in str(error.value)
  if what == "moved":
    shutil.rmtree(workdir, ignore_errors=True)
    (tmp_path / "elsewhere/run.lock").unlink()  # This process, which holds it, has not ended.
    (tmp_path / "elsewhere").rename(workdir)
    fake.at_step, fake.scores = (lambda n: None), [0.6]
    assert train_lib.train(config, workdir) and scored(workdir) == [(3, 0.5), (6, 0.6)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_the_first_signal_saves_and_asks_to_be_started_again(config, fake, tmp_path, capsys, number):
  fake.scores, fake.at_step = [0.5], lambda n: signal.raise_signal(number) if n == 4 else None
  found = signal.signal(number, signal.SIG_DFL)  # Whether or not nohup started the tests.
  try:
    with pytest.raises(distributed.Preempted) as stopped:
      train_lib.train(config, tmp_path / "run")
    assert stopped.value.code == 75 and signal.getsignal(number) == signal.SIG_DFL
  finally:
    signal.signal(number, found)
  assert f"{number.name}: stopped after step 4 of 6, checkpoint saved" in capsys.readouterr().out
  assert Checkpoints(tmp_path / "run", read_only=True).latest_step() == 4


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with distributed.StopSignal() as stop:
      signal.raise_signal(signal.SIGHUP)
      assert not stop.requested(1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_a_program_at_once_even_outside_of_python_code():
  code = """
import ctypes, os, signal, threading
from segjax.run import distributed
libc = ctypes.CDLL(None)
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell starts background jobs, as these tests, without.
with distributed.StopSignal() as stop:
  for after in (0.2, 0.6):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
  for _ in range(3):
    libc.sleep(30)  # As in a compilation: handlers do not run.
print("slept")
"""
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
  assert result.returncode == 128 + signal.SIGINT, result.stderr
  assert "once more to stop at once" in result.stderr and "Traceback" not in result.stderr and not result.stdout


class Later:
  """A metric of a step, which is computed when somebody waits for it."""

  def __init__(self):
    self.done = False

  def block_until_ready(self):
    self.done = True
    return self

  def __array__(self, dtype=None, copy=None):
    self.block_until_ready()
    return np.zeros((), dtype or np.float32)

  def __float__(self):
    return float(self.__array__())


def test_the_host_runs_two_steps_ahead_at_most_and_never_waits_for_the_last(config, fake, tmp_path):
  config.num_steps = config.log_every = config.eval_every = config.checkpoint_every = 8
  given, in_flight = [], []

  def step(state, batch):
    given.append(Later())
    in_flight.append(sum(not metric.done for metric in given))
    return dataclasses.replace(state, step=state.step + 1), dict(loss=given[-1])

  fake.step, fake.scores = step, [0.5]
  train_lib.train(config, tmp_path / "run")
  assert in_flight == [1, *[1] * 1, *[steps.IN_FLIGHT] * 6]  # The first is waited for: it compiles.
