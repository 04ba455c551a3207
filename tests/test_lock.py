"""Two runs never write to one workdir, and a dead run does not keep it."""

import json
import os
import subprocess
import sys
import time

import pytest

from segjax.config import ConfigError
from segjax.run.lock import LOCK_FILE, Lock

HOLD = """
import sys, time
from segjax.run.lock import Lock
Lock(sys.argv[1], beat=0.05).acquire()
print("held", flush=True)
time.sleep(60)
"""


def hold(workdir):
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(workdir)], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


def edit(workdir, **changes):
  path = workdir / LOCK_FILE
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_living_run_keeps_its_workdir_and_is_named(tmp_path):
  process = hold(tmp_path)
  try:
    since = json.loads((tmp_path / LOCK_FILE).read_text())["since"]
    with pytest.raises(ConfigError, match="is in use by another run") as error:
      Lock(tmp_path).acquire()
    assert f"process {process.pid} on" in str(error.value) and since in str(error.value)
  finally:
    process.kill()
    process.wait()


def test_a_killed_run_does_not_even_as_a_zombie(tmp_path, capsys):
  process = hold(tmp_path)
  process.kill()  # Not waited for yet.
  time.sleep(0.2)
  with Lock(tmp_path, beat=0.05) as lock:
    lock.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
  assert "took over" in capsys.readouterr().out and not (tmp_path / LOCK_FILE).exists()
  process.wait()


def test_a_number_that_is_another_process_now_is_dead(tmp_path):
  lock = Lock(tmp_path)
  lock.acquire()
  edit(tmp_path, started="1")
  with Lock(tmp_path, beat=0.05) as second:
    second.acquire()


def test_a_run_of_another_host_lives_while_it_touches_the_file(tmp_path):
  process = hold(tmp_path)
  try:
    edit(tmp_path, host="elsewhere boot pid:[1]")
    with pytest.raises(ConfigError, match="on elsewhere, since"):
      Lock(tmp_path, beat=0.05, quiet=20).acquire()
  finally:
    process.kill()
    process.wait()
  begin = time.monotonic()
  with Lock(tmp_path, beat=0.05, quiet=1) as lock:
    lock.acquire()
  assert time.monotonic() - begin >= 1


def test_a_run_that_lost_its_lock_learns_of_it_and_leaves_the_file(tmp_path):
  first = Lock(tmp_path)
  first.acquire()
  first.check()
  edit(tmp_path, token="other")
  with pytest.raises(ConfigError, match="another run took"):
    first.check()
  first.release()
  assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_cut_short_is_watched_then_taken(tmp_path):
  (tmp_path / LOCK_FILE).write_text('{"host": "el')
  with Lock(tmp_path, beat=0.05, quiet=0.3) as lock:
    lock.acquire()
    lock.check()


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"host": 3, "token": null}', '{"host": " "}', "[" * 10**5, "\0"])
def test_a_damaged_lock_is_watched_then_taken(text, tmp_path):
  (tmp_path / LOCK_FILE).write_text(text)
  with Lock(tmp_path, beat=0.05, quiet=0.1) as lock:
    lock.acquire()
    lock.check()
  assert not (tmp_path / LOCK_FILE).exists()
