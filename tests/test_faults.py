"""What happens to real runs: killed, stopped, started twice, their checkpoints damaged. pytest -m faults -s shows each try.

docs/reliability.md tells what was tried how often.
"""

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from segjax import config as config_lib
from segjax import train as train_lib
from segjax.config import ConfigError
from segjax.run.checkpoint import damage
from segjax.run.distributed import HEARTBEAT_TIMEOUT, PREEMPTED
from tests.folder_of_images import folder_of_images
from tests.test_train import assert_identical, checkpoint, finish, read_metrics, start

pytestmark = pytest.mark.faults
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def long_config(tiny_config):
  """Some seconds of steps, with a checkpoint being written at nearly any moment."""
  tiny_config.num_steps, tiny_config.checkpoint_every, tiny_config.eval_every = 100, 2, 25
  return tiny_config


@pytest.fixture(autouse=True)
def no_run_outlives_its_test():
  Run.started = []
  yield
  end_all()


def end_all():
  for run in Run.started:
    if run.process.poll() is None:
      run.process.terminate()  # The launcher passes it on.
      run.process.wait(timeout=60)


class Run:
  """A started run, whose output is read as it comes."""

  started = []

  def __init__(self, process):
    self.process, self.lines, self.ended, self._news = process, [], False, threading.Condition()
    Run.started.append(self)
    threading.Thread(target=self._read, daemon=True).start()

  def _read(self):
    for line in self.process.stdout:
      with self._news:
        self.lines.append(line)
        self._news.notify_all()
    with self._news:
      self.ended = True
      self._news.notify_all()

  @property
  def output(self):
    return "".join(self.lines)

  def wait_for(self, *texts, timeout=300):
    """Until the output has one of the texts."""
    with self._news:
      self._news.wait_for(lambda: self.ended or any(text in self.output for text in texts), timeout)
    assert any(text in self.output for text in texts), self.output

  def wait(self, timeout=300):
    return self.process.wait(timeout)


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_sigkill_at_twenty_random_moments_changes_no_bit(long_config, tmp_path, loader):
  """Kills a run again and again until it is complete, then the next, until there were 20 kills."""
  long_config.data.loader = loader
  whole = tmp_path / "whole"
  reference = Run(start(long_config, whole))
  reference.wait_for("training from step")
  begin = time.monotonic()
  assert reference.wait() == 0, reference.output
  duration = time.monotonic() - begin
  draw, kills, writing, complete, finished = random.Random(loader), 0, 0, 0, False
  while kills < 20 or not finished:
    workdir = tmp_path / f"broken{complete}"
    run = Run(start(long_config, workdir))
    run.wait_for("training from step", "this run is complete")  # Killed after its last save.
    if kills < 20:
      time.sleep(draw.uniform(0, 0.6 * duration))
    finished = False
    if kills < 20 and run.process.poll() is None:
      run.process.send_signal(signal.SIGKILL)
      run.wait()
      kills += 1
      unfinished = list((workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"))
      writing += bool(unfinished)
      done = sorted(
        int(p.name.removeprefix("step_")) for p in (workdir / "checkpoints").glob("step_*") if p not in unfinished
      )
      print(f"{loader} kill {kills}: last complete checkpoint {done[-1:]}, being written {len(unfinished)}", flush=True)
    else:
      assert run.wait() == 0, run.output
      assert "DAMAGED" not in run.output
      assert_identical(checkpoint(whole, 100), checkpoint(workdir, 100))
      complete, finished = complete + 1, True
  print(
    f"{loader}: {kills} kills, {writing} while a checkpoint was being written; {complete} runs, all bit for bit equal"
  )


def test_sigterm_saves_and_asks_to_be_started_again(long_config, tmp_path):
  long_config.checkpoint_every = 1000  # So that, but for evaluations, only SIGTERM saves.
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  finish(start(long_config, whole))
  draw, stopped = random.Random(0), []
  for after in sorted(draw.sample(range(2, 90, 2), 5)):
    run = Run(start(long_config, broken))
    run.wait_for(f"step {after + 2 if after in stopped else after:>6}/100")
    time.sleep(draw.uniform(0, 0.05))
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == PREEMPTED == 75, run.output
    stopped.append(int(re.search(r"SIGTERM: stopped after step (\d+) of 100, checkpoint saved", run.output)[1]))
    assert "checkpoint_manager" not in run.output  # Orbax, of checkpoints without a score.
    assert stopped[-1] >= after
    assert (broken / "checkpoints" / f"step_{stopped[-1]}").is_dir() and not (broken / "run.lock").exists()
  finish(start(long_config, broken))
  assert_identical(checkpoint(whole, 100), checkpoint(broken, 100))
  print(f"SIGTERM: stopped after steps {stopped}, each time code 75; the end is bit for bit equal")


def together(config, workdir, *arguments):
  """Two processes of two CPU devices, by the local launcher."""
  folder = workdir.with_name(workdir.name + "_config")
  folder.mkdir(exist_ok=True)
  config_lib.save(config, folder)
  environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environ |= dict(PROCESSES="2", CPU_DEVICES="2", PYTHON=sys.executable)
  command = [
    ROOT / "launch" / "local.sh",
    f"--config={config_lib.__file__}:{folder}",
    f"--workdir={workdir}",
    *arguments,
  ]
  return Run(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


def process_of(run, index):
  """The pid of one of the processes that the launcher started."""
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      command, parent = (path / "cmdline").read_text(), (path / "stat").read_text().rpartition(")")[2].split()[1]
    except OSError:
      continue
    if int(parent) == run.process.pid and f"--process_id={index}" in command:
      return int(path.name)
  raise AssertionError(run.output)


def test_the_death_of_one_of_two_processes_stops_the_other_and_both_resume(long_config, tmp_path):
  long_config.mesh.data, long_config.num_steps, long_config.checkpoint_every = -1, 50, 5
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  assert (reference := together(long_config, whole)).wait(600) == 0, reference.output
  for victim, step in ((1, 8), (0, 18), (1, 28)):
    run = together(long_config, broken)
    run.wait_for(f"step {step:>6}/50")
    os.kill(process_of(run, victim), signal.SIGKILL)
    begin = time.monotonic()
    code = run.wait(timeout=HEARTBEAT_TIMEOUT + 60)
    seconds = time.monotonic() - begin
    # By the failed collective, or by the heartbeat, where it waits on the host.
    assert code == 137 and ("another process stopped first" in run.output or "another task died" in run.output), (
      run.output
    )
    assert seconds < HEARTBEAT_TIMEOUT + 15
    print(f"process {victim} killed at step {step}: the other stopped after {seconds:.1f} s")
  run = together(long_config, broken)
  run.wait_for("step     38/50")
  os.kill(process_of(run, 1), signal.SIGTERM)  # One of them is enough: they agree on the step.
  assert run.wait() == PREEMPTED and "checkpoint saved" in run.output, run.output
  run = together(long_config, broken)
  assert run.wait(600) == 0 and "init: resumed" in run.output, run.output
  assert_identical(checkpoint(whole, 50), checkpoint(broken, 50))


def test_sigterm_ends_an_evaluation_of_two_processes(tiny_config, tmp_path):
  train_lib.train(tiny_config, tmp_path / "run")
  tiny_config.mesh.data, tiny_config.data.num_val = -1, 1_000_000  # An hour of evaluation.
  run = together(tiny_config, tmp_path / "run", "--mode=eval")
  time.sleep(30)  # It says nothing before its end.
  os.kill(process_of(run, 1), signal.SIGTERM)
  assert run.wait(timeout=HEARTBEAT_TIMEOUT + 15) == 143, run.output
  assert "another process stopped first" in run.output or "another task died" in run.output, run.output


def test_a_second_run_on_a_workdir_is_refused_and_the_first_goes_on(long_config, tmp_path):
  first = Run(start(long_config, tmp_path / "run"))
  first.wait_for("training from step")
  for _ in range(2):
    second = Run(start(long_config, tmp_path / "run"))
    assert second.wait() == 2, second.output
    assert f"is in use by another run: process {first.process.pid} on" in second.output
  assert first.wait() == 0, first.output
  assert (tmp_path / "run" / "checkpoints" / "step_100").is_dir() and not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "removed"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_the_same(tiny_config, tmp_path, capsys, damage):
  workdir = tmp_path / "run"
  train_lib.train(tiny_config, workdir)
  before = checkpoint(workdir, 6)
  files = [p for p in (workdir / "checkpoints" / "step_6" / "default").rglob("*") if p.is_file()]
  path = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  {
    "flipped byte": lambda: path.write_bytes(content),
    "truncated": lambda: path.write_bytes(content[:-1]),
    "removed": path.unlink,
  }[damage]()
  train_lib.train(tiny_config, workdir)
  output = capsys.readouterr().out
  assert "DAMAGED CHECKPOINT step_6" in output and str(path.relative_to(workdir)) in output, output
  assert "resumed" in output and "at step 3" in output and (workdir / "damaged_checkpoints" / "step_6").is_dir()
  assert_identical(before, checkpoint(workdir, 6))


def test_sigterm_during_an_evaluation_lets_it_end_and_saves(long_config, tmp_path):
  """The evaluation's score is in the curves once, and the end is that of a run that nobody stopped."""
  long_config.data.num_val, long_config.eval_every, long_config.checkpoint_every = 2000, 25, 1000
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  finish(start(long_config, whole))
  for step in (25, 50, 75):
    run = Run(start(long_config, broken))
    run.wait_for(f"step {step:>6}/100")
    run.process.send_signal(signal.SIGTERM)
    assert f"val at step {step}" not in run.output
    assert run.wait() == PREEMPTED, run.output
    assert f"val at step {step}" in run.output and f"SIGTERM: stopped after step {step} of 100" in run.output
  finish(start(long_config, broken))
  assert_identical(checkpoint(whole, 100), checkpoint(broken, 100))
  assert [line["step"] for line in read_metrics(broken) if "val/mean_iou" in line] == [25, 50, 75, 100]


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 16 MB."""
  disk = tmp_path / "disk"
  disk.mkdir()
  result = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, text=True, check=False
  )
  if result.returncode:
    pytest.skip(f"needs to mount a small file system, which takes root: {result.stderr.strip()}")
  yield disk
  end_all()
  subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_a_full_disk_stops_with_the_last_checkpoint_kept_and_a_freed_one_goes_on(
  long_config, small_disk, tmp_path, loader
):
  long_config.data.loader = loader
  whole, workdir, filler = tmp_path / "whole", small_disk / "run", small_disk / "filler"
  finish(start(long_config, whole))
  with filler.open("wb") as file:
    file.write(bytes(13 << 20))
  for step in (10, 40):  # Filled in the middle of the run.
    run = Run(start(long_config, workdir))
    run.wait_for(f"step {step:>6}/100")
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
      while True:
        file.write(bytes(4096))
    assert run.wait() == 2, run.output
    message = run.output[run.output.rindex("segjax: ") :]
    assert f"{workdir} can no longer be written" in message and "No space left on device" in message, run.output
    assert f"df -h {workdir}" in message, run.output  # Orbax logs traces of its own.
    kept = int(re.search(r"The checkpoint of step (\d+) is complete", message)[1])
    assert kept >= step - 4 and not damage(workdir / "checkpoints" / f"step_{kept}")
    print(f"{loader}, full at step {step}: {message}")
    os.truncate(filler, 8 << 20)
  finish(start(long_config, workdir))
  assert_identical(checkpoint(whole, 100), checkpoint(workdir, 100))


def test_a_read_only_workdir_is_refused_with_the_reason(tiny_config, small_disk):
  train_lib.train(tiny_config, small_disk / "run")
  tiny_config.num_steps = 8
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  for workdir in (small_disk / "run", small_disk / "new"):
    with pytest.raises(ConfigError, match=r"cannot be written \(.*Read-only file system"):
      train_lib.train(tiny_config, workdir)
  subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
  assert train_lib.train(tiny_config, small_disk / "run")


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_a_file_that_rots_in_mid_run_stops_or_is_counted_as_configured(long_config, tmp_path, loader):
  folder = folder_of_images(long_config, tmp_path / "data")
  folder.data.loader = loader
  image = tmp_path / "data/images/train/07.png"
  sound = image.read_bytes()
  for bad, workdir in ((0, tmp_path / "stops"), (1, tmp_path / "counts")):
    folder.data.max_bad_examples = bad
    run = Run(start(folder, workdir))
    run.wait_for("step     10/100")
    image.write_bytes(sound[:200])
    code = run.wait()
    if bad:
      assert code == 0 and "BAD EXAMPLE images/train/07, void in step" in run.output, run.output
      end = checkpoint(workdir, 100)
      shutil.rmtree(workdir / "checkpoints/step_100")
      image.write_bytes(sound)  # Restored: what was void is so again.
      finish(start(folder, workdir))
      assert_identical(end, checkpoint(workdir, 100))
    else:
      assert code == 2 and "Example images/train/07, needed in step" in run.output and "07.png" in run.output, (
        run.output
      )
      image.write_bytes(sound)
      finish(start(folder, workdir))  # Goes on from the last checkpoint.
