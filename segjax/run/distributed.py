"""Several processes as one program: how they connect, act as one, and stop. A run on one process needs none of this."""

import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from segjax.config import ConfigError
from segjax.run.cluster import Processes

# What a run that saved on SIGTERM ends with, for schedulers to start it again: EX_TEMPFAIL of sysexits.h. 143 would be
# a process that SIGTERM killed before it could save.
PREEMPTED = 75
# Seconds without a sign of life after which JAX takes a process for dead, and ends the others with SIGABRT and a message
# that names it. A thread of the runtime gives the signs, so no compilation delays them.
HEARTBEAT_TIMEOUT = 30


class Preempted(SystemExit):
  """The run was told to stop, saved, and can go on; ends the program with exit code `PREEMPTED`."""

  def __init__(self):
    super().__init__(PREEMPTED)


@contextlib.contextmanager
def connected(processes: Processes | None, timeout: float, *, stops_at_a_step: bool = True):
  """Connects this process with the others, before any other use of JAX; nothing for one process.

  In the `with` block, the end of any process ends all, with a message: by the failure of a collective at once, else by
  JAX's heartbeat within `HEARTBEAT_TIMEOUT`. A process that fails ends at once: leaving in the ordinary way, it would
  first wait minutes for the others, and they for it.

  Args:
    timeout: seconds to wait for all of them. When they have passed, the program ends with exit code 2 and a message.
    stops_at_a_step: whether the block asks a `StopSignal`, for which SIGTERM is kept; else it ends the program.

  Raises:
    ConfigError: the address cannot be used.
  """
  if processes is None:
    yield
    return
  jax.config.update("jax_enable_preemption_service", stops_at_a_step)
  _connect(processes, timeout)
  try:
    yield
  except Preempted:
    raise
  except BaseException as error:
    _fail(error)


def _connect(processes: Processes, timeout: float) -> None:
  address = processes.coordinator or "the address that JAX detected"
  others = f" of {processes.num_processes}"
  if processes.process_id is None:
    missing = f"the processes did not all come together at {address} within {timeout:.0f} s"
  elif processes.process_id == 0:
    missing = f"process 0{others} listened at {address} for {timeout:.0f} s, and not all others came"
  else:
    name = f"process {processes.process_id}{others}"
    missing = f"{name} could not reach the coordinator, process 0, at {address} within {timeout:.0f} s"

  def give_up():
    advice = (
      "Did every process start, with the same number of processes? Can the hosts resolve and reach that address? Is its"
      " port free, and open in the firewall?"
    )
    print(f"segjax: {missing} (from {processes.origin}). {advice}", file=sys.stderr, flush=True)
    os._exit(2)  # The main thread waits inside the runtime.

  # The runtime would end the process by abort() with a C++ trace; a little before that, we do with a message.
  watchdog = threading.Timer(timeout, give_up)
  watchdog.daemon = True
  watchdog.start()
  try:
    jax.distributed.initialize(
      processes.coordinator,
      processes.num_processes,
      processes.process_id,
      processes.local_device_ids,
      cluster_detection_method="deactivate" if processes.num_processes else None,
      initialization_timeout=int(timeout) + 30,
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
    )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"The processes cannot be connected at {address} (from {processes.origin}): {error}. Is the port free, and is the"
      " address one of process 0's host? --coordinator, --num_processes and --process_id go before what is detected."
    ) from error
  finally:
    watchdog.cancel()


def _fail(error: BaseException):
  """Ends a process that failed among several, which then stop as well."""
  try:
    advice = ""
    if not isinstance(error, SystemExit):  # Whose message has been printed.
      traceback.print_exception(error)
      advice = (
        " Where the lines above speak of a connection, a peer or a timeout, another process stopped first, and its own"
        " output has the reason."
      )
    name = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"segjax: {name} stopped for the reason above.{advice}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
  finally:  # Also where nobody reads the output any more, which may be the error itself.
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def on_first(function: Callable):
  """Calls `function` on process 0 alone and broadcasts its result, which must fit into JSON, to all processes.

  Raises:
    What `function` raises on process 0; ConfigError with the same message on the others.
  """
  if jax.process_count() == 1:
    return function()
  failure, message = None, b""
  if jax.process_index() == 0:
    try:
      message = json.dumps(dict(result=function())).encode()
    except Exception as error:  # Whatever it is, the others must not wait for a result.
      failure, message = error, json.dumps(dict(error=str(error))).encode()
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
  buffer = np.frombuffer(message.ljust(length, b"\0"), np.uint8)
  received = json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())
  if failure is not None:
    raise failure
  if "error" in received:
    raise ConfigError(f"process 0 stopped: {received['error']}")
  return received["result"]


class StopSignal:
  """SIGTERM, SIGINT (Ctrl-C) or SIGHUP as a request to stop at the next step, the same one on every process.

  A second SIGINT ends the program at once, whatever it is doing. A signal that the program was started to ignore (as by
  nohup) stays ignored. Among several processes JAX's preemption service catches SIGTERM, on whichever of them it arrives,
  and agrees on the step; the other signals are passed on to it.

  Attributes:
    name: of the signal that came, once one did.
  """

  def __init__(self):
    self.name, self._received, self._previous = "SIGTERM", False, {}

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      reader, self._writer = os.pipe()
      os.set_blocking(self._writer, False)
      threading.Thread(target=_end_at_second_interrupt, args=(reader,), name="segjax-stop", daemon=True).start()
      self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
      for number in (signal.SIGINT, signal.SIGHUP, *(() if jax.process_count() > 1 else (signal.SIGTERM,))):
        if signal.getsignal(number) != signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *error) -> None:
    for number, previous in self._previous.items():
      signal.signal(number, signal.SIG_DFL if previous is None else previous)
    if threading.current_thread() is threading.main_thread():
      signal.set_wakeup_fd(self._previous_writer)
      os.close(self._writer)

  def _receive(self, number, frame) -> None:
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self._received, self.name = True, signal.Signals(number).name

  def requested(self, step: int) -> bool:
    """Whether to stop before `step`; to be asked for every step."""
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._received


def _end_at_second_interrupt(reader: int) -> None:
  """Reads signals from a pipe: the main thread, where Python runs handlers, may compile for minutes."""
  interrupts = 0
  while number := os.read(reader, 1):
    if number[0] == signal.SIGINT:
      interrupts += 1
      with contextlib.suppress(OSError):  # Nobody reads it.
        os.write(
          2, b"\nSIGINT: " + (b"stopping, once more to stop at once\n" if interrupts == 1 else b"stopped at once\n")
        )
      if interrupts == 2:
        os._exit(128 + signal.SIGINT)
  os.close(reader)
