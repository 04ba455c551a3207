"""Which of a run's processes this is: from flags or variables, else by JAX's own cluster detection.

All processes start the same command; each must learn where process 0 listens (the coordinator), how many they are and
which it is. `jax.distributed` detects Open MPI, SLURM and TPU pods. Written here is what its detection lacks:

* telling one process from several, without a connection and before JAX is imported;
* variables for number and id (it reads JAX_COORDINATOR_ADDRESS alone);
* Kubernetes without its API server, which pods mostly may not ask;
* a share of the GPUs for each task (it takes one GPU, also where a node has one task for all);
* SLURM host names that go on after a bracket: of jwb[01-04].juwels it takes jwb01.
"""

import dataclasses
import re
from collections.abc import Mapping

from segjax.config import ConfigError

_JOBSET_PORT = 8476  # Nothing else listens in a pod of ours, so any port would do.


@dataclasses.dataclass(frozen=True)
class Processes:
  """Which of a run's processes this is; `jax.distributed.initialize` detects what is None.

  Attributes:
    coordinator: "host:port" where process 0 listens.
    num_processes, process_id: how many, and which.
    local_device_ids: of the GPUs that this process sees, those it uses; () for all.
    origin: the settings these come from, for messages.
  """

  coordinator: str | None
  num_processes: int | None
  process_id: int | None
  local_device_ids: tuple[int, ...] | None
  origin: str


def find_processes(
  environ: Mapping[str, str],
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> Processes | None:
  """How the run is spread, from flags, else from the environment; None for one process.

  In this order: the three flags; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; Kubernetes
  (JOBSET_COORDINATOR and JOBSET_NUM_PROCESSES, which launch/jobset.yaml sets, and JOB_COMPLETION_INDEX, which Kubernetes
  does); several tasks of Open MPI (mpirun), then of a SLURM step (srun).

  Args:
    environ: os.environ.
    coordinator, num_processes, process_id: the flags. num_processes=1 asks for one process whatever the environment;
      coordinator="auto" for JAX's detection, also where no launcher says that there are several processes.

  Raises:
    ConfigError: settings that are incomplete or contradict each other, by name and with the remedy.
  """
  if num_processes == 1:
    return None
  if coordinator == "auto":
    if num_processes is not None or process_id is not None:
      raise ConfigError("--coordinator=auto finds number and id of the processes itself. Leave the other flags out.")
    return _launched(environ) or Processes(None, None, None, None, "--coordinator=auto")
  given_flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
  sources = (
    (given_flags, tuple(given_flags)),
    (environ, ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")),
    (environ, ("JOBSET_COORDINATOR", "JOBSET_NUM_PROCESSES", "JOB_COMPLETION_INDEX")),
  )
  for values, names in sources:
    given = [name for name in names if name in values and values[name] not in (None, "")]
    if not given or given == ["JOB_COMPLETION_INDEX"]:  # Which every indexed job of Kubernetes has.
      continue
    if missing := [name for name in names if name not in given]:
      raise ConfigError(
        f"{', '.join(given)} given without {', '.join(missing)}: several processes need"
        f" all of {', '.join(names)}, one process none of them."
      )
    address, count, index = str(values[names[0]]), _number(values, names[1]), _number(values, names[2])
    if names[0] == "JOBSET_COORDINATOR" and ":" not in address:
      address = f"{address}:{_JOBSET_PORT}"
    return _checked(address, count, index, names)
  return _launched(environ)


def _launched(environ: Mapping[str, str]) -> Processes | None:
  """Several tasks of a launcher that JAX detects; it finds their number and this one's id."""
  tasks, local = "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
  if _has_several(environ, "OMPI_COMM_WORLD_SIZE", tasks, local):
    devices = _gpu_share(environ, _number(environ, tasks), tasks, local)
    return Processes(None, None, None, devices, "OMPI_COMM_WORLD_SIZE")
  # SLURM_STEP_*: set by srun alone, so a batch script or an interactive shell in an allocation is one process.
  nodes, tasks, local = "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"
  read_by_jax = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")
  if _has_several(environ, "SLURM_STEP_NUM_TASKS", nodes, tasks, local, "SLURM_NODEID", *read_by_jax):
    # JAX's own port of the job; JAX_COORDINATOR_PORT where two steps of a job collide.
    port = 61440 + _number(environ, "SLURM_JOB_ID") % 4096
    if "JAX_COORDINATOR_PORT" in environ:
      port = _number(environ, "JAX_COORDINATOR_PORT")
    devices = _gpu_share(environ, tasks_on_node(environ[tasks], _number(environ, "SLURM_NODEID")), tasks, local)
    return Processes(f"{first_host(environ[nodes])}:{port}", None, None, devices, f"SLURM_STEP_NUM_TASKS, {nodes}")
  return None


def _has_several(environ: Mapping[str, str], count: str, *others: str) -> bool:
  if count not in environ or _number(environ, count) == 1:
    return False
  if missing := [name for name in others if not environ.get(name)]:
    raise ConfigError(
      f"{count}={environ[count]}, but {', '.join(missing)} not set. Start the processes with srun (launch/slurm.sbatch)"
      " or mpirun, or give --num_processes=1 for one."
    )
  return True


def _gpu_share(environ: Mapping[str, str], tasks: int, origin: str, local: str) -> tuple[int, ...] | None:
  """This task's share of the GPUs that it and the other `tasks` of its node see."""
  if "JAX_LOCAL_DEVICE_IDS" in environ:  # Which JAX reads.
    return None
  visible = [device for device in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
  if tasks == 1 or len(visible) <= 1:  # All of the node's; or bound by SLURM (--gpus-per-task), or no GPUs.
    return ()
  if len(visible) % tasks:
    raise ConfigError(
      f"CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']}: {len(visible)} GPUs cannot be shared by"
      f" {origin}={environ[origin]} tasks. Set the tasks of each node to 1 or to a divisor of the number of GPUs."
    )
  share, index = len(visible) // tasks, _number(environ, local)
  return tuple(range(index * share, (index + 1) * share))


def first_host(nodelist: str) -> str:
  """The first name of a SLURM node list: "gpu[03-07,9]-ib,x1" -> "gpu03-ib"."""
  return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)[0])


def tasks_on_node(counts: str, node: int) -> int:
  """Tasks on the node-th node of SLURM's "4(x2),3": 4, 4, 3.

  Raises:
    ConfigError: no such node in it.
  """
  parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
  per_node = [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]
  if node >= len(per_node):
    raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} has no node {node} (SLURM_NODEID). Start with srun.")
  return per_node[node]


def _number(values: Mapping, name: str) -> int:
  try:
    return int(values[name])
  except ValueError as error:
    raise ConfigError(f"{name}={values[name]!r} is no whole number. Set it to one.") from error


def _checked(address: str, count: int, index: int, names: tuple[str, ...]) -> Processes | None:
  if count < 1 or not 0 <= index < count:
    raise ConfigError(
      f"{names[2]}={index} with {names[1]}={count}: ids run from 0 to the number of processes - 1. Make them agree."
    )
  if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):\d+", address):
    raise ConfigError(f"{names[0]}={address}: not host:port, e.g. 10.0.0.1:8476, the same on every process.")
  return None if count == 1 else Processes(address, count, index, None, ", ".join(names))
