"""One run per workdir: a lock file that distinguishes a living run from a dead one."""

import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import uuid

from segjax.config import ConfigError

LOCK_FILE = "run.lock"  # In the workdir.


class Lock:
  """The lock file of a workdir: host, process and start time of the run that writes there.

  Processes of this host are looked up. One of another host (or container) cannot be, so the holder touches the file
  every `beat` seconds, and a file that nobody touches for `quiet` seconds is of a dead run. The file is compared with
  itself, so clocks need not agree; a network file system needs nothing but exclusive creation.

  Args:
    workdir: must exist when the lock is acquired.
    beat, quiet: seconds.
  """

  def __init__(self, workdir: str | os.PathLike, beat: float = 10, quiet: float = 60):
    self._path = pathlib.Path(workdir) / LOCK_FILE
    self._beat, self._quiet = beat, quiet
    self._token = None  # While held.
    self._ended = threading.Event()

  def acquire(self, say=print) -> None:
    """Takes the lock, from a dead run if need be.

    Raises:
      ConfigError: another run holds it; names its host, process and start time.
      OSError: the file cannot be written.
    """
    token = uuid.uuid4().hex
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    mine = dict(host=_host(), pid=os.getpid(), started=_started(os.getpid()), since=since, token=token)
    text = json.dumps(mine)
    try:
      with self._path.open("x") as file:
        file.write(text)
    except FileExistsError:
      holder = self._living_holder(say)
      if holder:
        raise ConfigError(
          f"{self._path.parent} is in use by another run: process {holder['pid']} on {holder['host'].split()[0]}, since"
          f" {holder['since']} ({self._path}). Wait until it ends, or give another --workdir."
        ) from None
      temporary = self._path.with_suffix(f".{token}.tmp")
      temporary.write_text(text)
      temporary.replace(self._path)
      time.sleep(min(1, self._beat))  # Another run may have come to the same conclusion: the last to write has it.
      if self._holder().get("token") != token:
        raise ConfigError(
          f"{self._path.parent} was taken by another run just now ({self._path}). Give another --workdir."
        ) from None
      say(f"note: took over {self._path} of a run that ended without removing it")
    self._token = token
    threading.Thread(target=self._touch, name="segjax-lock", daemon=True).start()

  def check(self) -> None:
    """Raises ConfigError where another run has taken the lock, having found this one dead (e.g. suspended).

    Raises:
      FileNotFoundError: the lock was removed, in all likelihood with its folder.
    """
    if self._token is not None and self._holder().get("token") != self._token:
      self._path.stat()
      raise ConfigError(
        f"{self._path.parent}: another run took {self._path} while this one was suspended or cut off. This one stops."
      )

  def release(self) -> None:
    """Removes the file, if it is still this run's."""
    self._ended.set()
    if self._token is not None and self._holder().get("token") == self._token:
      self._path.unlink(missing_ok=True)
    self._token = None

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *error) -> None:
    self.release()

  def _holder(self) -> dict:
    """What the file says; {} where it is gone, incomplete or damaged, which is how a run on an unknown host looks."""
    try:
      holder = json.loads(self._path.read_text())
    except (OSError, ValueError, RecursionError):
      return {}
    kinds = dict(host=str, pid=int, started=str, since=str, token=str)
    sound = isinstance(holder, dict) and all(isinstance(holder.get(name), kind) for name, kind in kinds.items())
    return holder if sound and holder["host"].strip() else {}

  def _living_holder(self, say) -> dict:
    """The holder, or {} where it is dead."""
    holder = self._holder()
    if holder and holder["host"] == _host():
      return holder if _started(holder["pid"]) == holder["started"] else {}
    name = holder["host"].split()[0] if holder else "an unknown host"
    say(f"{self._path} is of a run on {name}: watching it for {self._quiet:.0f} s ...")
    before, deadline = self._signature(), time.monotonic() + self._quiet
    while time.monotonic() < deadline:
      time.sleep(min(1, self._beat))
      if self._signature() != before:
        return self._holder()
    return {}

  def _signature(self):
    """Content and time of change; opened, because a network file system then asks its server."""
    try:
      with self._path.open() as file:
        return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError:
      return None

  def _touch(self) -> None:
    while not self._ended.wait(self._beat):
      try:
        if self._holder().get("token") == self._token:
          os.utime(self._path)
      except OSError:
        pass  # The file server may be back at the next beat.


def _host() -> str:
  """Names the set of processes that can be looked up from here: host, its boot, its process namespace."""
  name = socket.gethostname()
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{name} {boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # Not Linux.
    return name


def _started(pid: int) -> str:
  """When a process of this host started, "" where there is none: a number alone may be another process by now."""
  if pathlib.Path("/proc/self/stat").exists():
    try:
      fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
      return ""
    return "" if fields[0] in "ZX" else fields[19]  # Zombies have ended.
  ps = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
  return ps.stdout.strip()
