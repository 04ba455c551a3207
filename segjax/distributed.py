"""Several processes as one program: how they find each other, act as one, and stop.

A run on one process needs none of this. Several start the same command; each learns from its flags or its environment
where process 0 listens (the coordinator), how many they are and which it is, and JAX's runtime does the rest.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from segjax import peers
from segjax.config import ConfigError

# What a run that saved on SIGTERM ends with, for schedulers to start it again: EX_TEMPFAIL of sysexits.h. 143 would be
# a process that SIGTERM killed before it could save.
PREEMPTED = 75
# Seconds without a sign of life after which the runtime takes a process for dead and stops the others.
HEARTBEAT_TIMEOUT = 60
_JOBSET_PORT = 8476  # Nothing else listens in a pod of ours, so any port would do.


class Preempted(SystemExit):
  """The run was told to stop, saved, and can go on; ends the program with exit code `PREEMPTED`."""

  def __init__(self):
    super().__init__(PREEMPTED)


@dataclasses.dataclass(frozen=True)
class Processes:
  """Where a process stands among those of its run.

  Attributes:
    coordinator: "host:port" where process 0 listens; "auto" leaves everything to JAX's own detection (TPU pods).
    num_processes, process_id: how many, and which; None with "auto".
    local_device_ids: of the GPUs that this process sees, those it uses; None for all.
    origin: the settings these come from, for messages.
  """

  coordinator: str
  num_processes: int | None
  process_id: int | None
  local_device_ids: tuple[int, ...] | None
  origin: str


def find_processes(environ: Mapping[str, str], coordinator: str | None = None, num_processes: int | None = None,
                   process_id: int | None = None) -> Processes | None:  # fmt: skip
  """How the run is spread, from flags, else from the environment; None for one process.

  In this order: the three flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Kubernetes
  (JOBSET_COORDINATOR and JOBSET_NUM_PROCESSES, which launch/jobset.yaml sets, and JOB_COMPLETION_INDEX, which Kubernetes
  does); a SLURM step (srun) of several tasks.

  Args:
    environ: os.environ.
    coordinator, num_processes, process_id: the flags. num_processes=1 asks for one process whatever the environment;
      coordinator="auto" for `jax.distributed.initialize()` without arguments.

  Raises:
    ConfigError: settings that are incomplete or contradict each other, by name and with the remedy.
  """
  if num_processes == 1:
    return None
  if coordinator == "auto":
    if num_processes is not None or process_id is not None:
      raise ConfigError("--coordinator=auto finds number and id of the processes itself. Leave the other flags out.")
    return Processes("auto", None, None, None, "--coordinator=auto")
  sources = (
    (
      {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id},
      ("--coordinator", "--num_processes", "--process_id"),
    ),
    (environ, ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")),
    (environ, ("JOBSET_COORDINATOR", "JOBSET_NUM_PROCESSES", "JOB_COMPLETION_INDEX")),
  )
  for values, names in sources:
    given = [name for name in names if name in values and values[name] not in (None, "")]
    if not given or given == ["JOB_COMPLETION_INDEX"]:  # Which every indexed job of Kubernetes has.
      continue
    missing = [name for name in names if name not in given]
    if missing:
      raise ConfigError(
        f"{', '.join(given)} given without {', '.join(missing)}: several processes need"
        f" all of {', '.join(names)}, one process none of them."
      )
    address, count, index = str(values[names[0]]), _number(values, names[1]), _number(values, names[2])
    if names[0] == "JOBSET_COORDINATOR" and ":" not in address:
      address = f"{address}:{_JOBSET_PORT}"
    return _checked(address, count, index, None, names)
  return _slurm(environ)


def _slurm(environ: Mapping[str, str]) -> Processes | None:
  # SLURM_STEP_*: set by srun alone, so a batch script or an interactive shell in an allocation is one process.
  names = ("SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
  if "SLURM_STEP_NUM_TASKS" not in environ or environ["SLURM_STEP_NUM_TASKS"] == "1":
    return None
  needed = (*names, "SLURM_JOB_ID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
  missing = [name for name in needed if name not in environ]
  if missing:
    raise ConfigError(
      f"SLURM_STEP_NUM_TASKS={environ['SLURM_STEP_NUM_TASKS']}, but {', '.join(missing)} not set. Start the processes"
      " with srun (launch/slurm.sbatch), or give --num_processes=1 for one."
    )
  # One free port in JAX's own range for each job of a node; JAX_COORDINATOR_PORT where two steps of a job collide.
  port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
  if "JAX_COORDINATOR_PORT" in environ:
    port = _number(environ, "JAX_COORDINATOR_PORT")
  address = f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
  index = _number(environ, names[2])
  return _checked(address, _number(environ, names[1]), index, _slurm_devices(environ), names)


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
  """This task's share of the GPUs it sees. JAX would take one GPU, whether a node has one task or one per GPU."""
  tasks = tasks_on_node(environ["SLURM_STEP_TASKS_PER_NODE"], _number(environ, "SLURM_NODEID"))
  visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
  if tasks == 1 or len(visible) <= 1:  # All of the node's; or bound by SLURM (--gpus-per-task), or no GPUs.
    return None
  if len(visible) % tasks:
    raise ConfigError(
      f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']}: {len(visible)} GPUs cannot be shared by"
      f" SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} tasks. Set --ntasks-per-node to 1 or to a"
      " divisor of the number of GPUs."
    )
  share, local = len(visible) // tasks, _number(environ, "SLURM_LOCALID")
  return tuple(range(local * share, (local + 1) * share))


def first_host(nodelist: str) -> str:
  """The first name of a SLURM node list: "gpu[03-07,9]-ib,x1" -> "gpu03-ib".

  Raises:
    ConfigError: no name in it.
  """
  first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
  if not first:
    raise ConfigError(f"SLURM_STEP_NODELIST={nodelist!r} names no host. Start the processes with srun.")
  return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def tasks_on_node(counts: str, node: int) -> int:
  """Tasks on the node-th node of SLURM's "4(x2),3": 4, 4, 3.

  Raises:
    ConfigError: no such node in it.
  """
  per_node = []
  for part in re.finditer(r"(\d+)(?:\(x(\d+)\))?", counts):
    per_node += [int(part[1])] * int(part[2] or 1)
  if node >= len(per_node):
    raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} has no node {node} (SLURM_NODEID). Start with srun.")
  return per_node[node]


def _number(values: Mapping, name: str) -> int:
  try:
    return int(values[name])
  except ValueError as error:
    raise ConfigError(f"{name}={values[name]!r} is no whole number. Set it to one.") from error


def _checked(address: str, count: int, index: int, devices, names: tuple[str, ...]) -> Processes | None:
  if count < 1 or not 0 <= index < count:
    raise ConfigError(
      f"{names[2]}={index} with {names[1]}={count}: ids run from 0 to the number of processes - 1. Make them agree."
    )
  if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d+", address):
    raise ConfigError(f"{names[0]}={address}: not host:port, e.g. 10.0.0.1:8476, the same on every process.")
  return None if count == 1 else Processes(address, count, index, devices, ", ".join(names))


@contextlib.contextmanager
def connected(processes: Processes | None, timeout: float):
  """Connects this process with the others, before any other use of JAX; nothing for one process.

  In the `with` block, the end of any process ends all, with a message. A process that fails ends at once: leaving in
  the ordinary way, it would first wait minutes for the others, and they for it.

  Args:
    timeout: seconds to wait for all of them. When they have passed, the program ends with exit code 2 and a message.

  Raises:
    ConfigError: the address cannot be used.
  """
  if processes is None:
    yield
    return
  _connect(processes, timeout)
  name = f"process {jax.process_index()} of {jax.process_count()}"
  try:
    with _watching_each_other(processes, name):
      yield
  except Preempted:
    raise
  except BaseException as error:
    _fail(error, name)


def _connect(processes: Processes, timeout: float) -> None:
  if processes.coordinator == "auto":
    missing = f"the processes that JAX's own detection found did not all come together within {timeout:.0f} s"
  elif processes.process_id == 0:
    missing = (
      f"process 0 of {processes.num_processes} listened at {processes.coordinator} for {timeout:.0f} s, and not all"
      " others came"
    )
  else:
    missing = (
      f"process {processes.process_id} of {processes.num_processes} could not reach the coordinator, process 0, at"
      f" {processes.coordinator} within {timeout:.0f} s"
    )

  def give_up():
    print(
      f"segjax: {missing} (from {processes.origin}). Did every process start, with the same number of processes? Can"
      " the hosts resolve and reach that address? Is its port free, and open in the firewall?",
      file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(2)  # The main thread waits inside the runtime.

  # The runtime would end the process by abort() with a C++ trace; a little before that, we do with a message.
  watchdog = threading.Timer(timeout, give_up)
  watchdog.daemon = True
  watchdog.start()
  known = {}
  if processes.coordinator != "auto":
    known = dict(
      coordinator_address=processes.coordinator,
      num_processes=processes.num_processes,
      process_id=processes.process_id,
      local_device_ids=processes.local_device_ids,
      cluster_detection_method="deactivate",
    )
  try:
    jax.distributed.initialize(
      **known, initialization_timeout=int(timeout) + 30, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
    )
  except (RuntimeError, ValueError) as error:
    raise ConfigError(
      f"The processes cannot be connected at {processes.coordinator} (from {processes.origin}): {error}. Is the port"
      " free, and is the address one of process 0's host?"
    ) from error
  finally:
    watchdog.cancel()


@contextlib.contextmanager
def _watching_each_other(processes: Processes, name: str):
  """Has every process notice at once when another ends, where the hosts can connect to each other's free ports."""
  listener = peers.Listener(jax.process_count() - 1) if jax.process_index() == 0 else None
  host, port = on_first(lambda: (socket.gethostname(), listener.port))
  if processes.coordinator != "auto":
    host = processes.coordinator.rpartition(":")[0].strip("[]")  # Known to be reachable.
  link = None
  try:
    if listener is None:
      link = peers.Watcher(host, port, f"{name} ({socket.gethostname()})")
    else:
      listener.accept()
      link = listener
  except OSError as error:
    print(f"note: {name} may hear of the end of others only after {HEARTBEAT_TIMEOUT} s: {host}:{port}: {error}")
  try:
    yield
  except Preempted:
    if link:
      link.close()
    raise
  if link:
    link.close()


def _fail(error: BaseException, name: str):
  """Ends a process that failed among several, which then stop as well."""
  if not isinstance(error, SystemExit):  # Whose message has been printed.
    traceback.print_exception(error)
  advice = ""
  if isinstance(error, jax.errors.JaxRuntimeError):
    advice = (
      " Where the lines above speak of a connection, a peer or a timeout, another process stopped first, and its own"
      " output has the reason."
    )
  print(f"segjax: {name} stopped for the reason above.{advice}", file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def on_first(function: Callable):
  """Calls `function` on process 0 alone and gives its result, which JSON must be able to hold, to all.

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
  """SIGTERM as a request to stop at the next step, the same one on every process.

  Among several processes JAX's preemption service catches the signal, on whichever of them it arrives, and agrees on
  the step.
  """

  def __init__(self):
    self._received, self._previous = False, None

  def __enter__(self) -> "StopSignal":
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *error) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _receive(self, number, frame) -> None:
    self._received = True

  def requested(self, step: int) -> bool:
    """Whether to stop before `step`; to be asked for every step."""
    return multihost_utils.reached_preemption_sync_point(step) if jax.process_count() > 1 else self._received
