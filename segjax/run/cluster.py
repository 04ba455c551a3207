"""Where a process stands among those of its run, from flags or from what SLURM, Kubernetes or a user has set.

All processes start the same command; each must learn where process 0 listens (the coordinator), how many they are and
which it is. JAX detects some clusters itself; where that suits every launch (TPU pods) we leave it to it, and where it
does not (it gives each SLURM task one GPU, and asks Kubernetes' API server, which pods mostly may not) we do it here.
"""

import dataclasses
import re
from collections.abc import Mapping

from segjax.config import ConfigError

_JOBSET_PORT = 8476  # Nothing else listens in a pod of ours, so any port would do.


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
