"""What each launcher's environment says about the processes of a run, and the errors of starting them."""

import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src import clusters
from jax._src import distributed as jax_distributed

from segjax.config import ConfigError
from segjax.run import cluster, distributed
from tests.marks import full

SLURM = dict(
  SLURM_JOB_ID="123456",
  SLURM_STEP_NODELIST="gpu[03-04,7]",
  SLURM_STEP_NUM_TASKS="8",
  SLURM_PROCID="5",
  SLURM_LOCALID="1",
  SLURM_NODEID="1",
  SLURM_STEP_TASKS_PER_NODE="4(x2)",
  SLURM_NTASKS="8",
)
MPI = dict(
  OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
  OMPI_COMM_WORLD_SIZE="4",
  OMPI_COMM_WORLD_RANK="3",
  OMPI_COMM_WORLD_LOCAL_SIZE="2",
  OMPI_COMM_WORLD_LOCAL_RANK="1",
)
JOBSET = dict(
  JOBSET_COORDINATOR="segjax-workers-0-0.segjax",
  JOBSET_NUM_PROCESSES="2",
  JOB_COMPLETION_INDEX="1",
  KUBERNETES_SERVICE_HOST="10.0.0.1",
)


def place(found):
  return found.coordinator, found.num_processes, found.process_id, found.local_device_ids


def detected(environ, patch, coordinator=None):
  """What JAX's own detection makes of what was found: coordinator, number, id, devices."""
  for name, value in environ.items():
    patch.setenv(name, value)
  found = cluster.find_processes(environ, coordinator)
  return clusters.ClusterEnv.auto_detect_unset_distributed_params(*place(found), None, 1)


@pytest.mark.parametrize(
  "environ",
  [
    {},
    dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_NODELIST="a[1-4]"),  # A batch script without srun.
    dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),
    dict(JOB_COMPLETION_INDEX="3", KUBERNETES_SERVICE_HOST="10.0.0.1"),  # Any indexed job.
    MPI | dict(OMPI_COMM_WORLD_SIZE="1"),
  ],
)
def test_one_process_stays_one(environ):
  assert cluster.find_processes(environ) is None
  with distributed.connected(None, timeout=1):
    pass


def test_num_processes_1_wins_over_any_environment():
  assert cluster.find_processes(SLURM | JOBSET, num_processes=1) is None


def test_flags_win_over_variables_and_variables_over_clusters():
  variables = dict(JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="2")
  found = cluster.find_processes(SLURM | variables, "b:2", 4, 0)
  assert place(found) == ("b:2", 4, 0, None)
  assert place(cluster.find_processes(SLURM | variables)) == ("a:1", 3, 2, None)
  assert place(cluster.find_processes(JOBSET, coordinator="auto")) == (None, None, None, None)  # All is JAX's to find.


@pytest.mark.parametrize("coordinator", [None, "auto"])
def test_slurm_gives_first_host_port_of_the_job_and_ids(monkeypatch, coordinator):
  # 123456 % 4096 = 576, and JAX's own detection has the same port for the job.
  assert detected(SLURM, monkeypatch, coordinator) == ("gpu03:62016", 8, 5, ())
  assert cluster.find_processes(SLURM | dict(JAX_COORDINATOR_PORT="999")).coordinator == "gpu03:999"


def test_open_mpi_gives_what_jax_detects_and_a_share_of_the_gpus(monkeypatch):
  address, *rest = detected(MPI | SLURM | dict(CUDA_VISIBLE_DEVICES="0,1,2,3"), monkeypatch)  # mpirun inside of srun.
  assert address.startswith("10.96.0.1:") and rest == [4, 3, (2, 3)]


def test_devices_that_the_user_names_stay_the_users():
  environ = SLURM | dict(CUDA_VISIBLE_DEVICES="0,1,2,3", JAX_LOCAL_DEVICE_IDS="2")
  assert cluster.find_processes(environ).local_device_ids is None  # JAX reads the variable.


def test_an_id_beyond_the_number_of_slurm_tasks_is_refused_by_name(monkeypatch):
  environ = SLURM | dict(SLURM_PROCID="8")
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, "initialize", jax_distributed.State().initialize)
  with pytest.raises(ConfigError, match="gpu03:62016 .from SLURM_STEP_NUM_TASKS.* process_id=8, num_processes=8"):
    with distributed.connected(cluster.find_processes(environ), timeout=60):
      pass


def test_slurm_agrees_with_the_detection_of_jax():
  for nodes in ("node001", "node001,host2", "node[001-0015],host2", "node[001,007-015],host2"):
    with pytest.MonkeyPatch.context() as patch:
      for name, value in (SLURM | dict(SLURM_STEP_NODELIST=nodes)).items():
        patch.setenv(name, value)
      theirs = clusters.SlurmCluster.get_coordinator_address(None, None)
    assert cluster.find_processes(SLURM | dict(SLURM_STEP_NODELIST=nodes)).coordinator == theirs


@pytest.mark.parametrize(
  "nodes, first",
  [("n[1-2]-ib,x", "n1-ib"), ("r[2,4]n[07-09]", "r2n07"), ("login", "login"), ("a-b[3],c", "a-b3")],
)
def test_the_first_host_of_any_node_list(nodes, first):
  assert cluster.first_host(nodes) == first


@pytest.mark.parametrize(
  "tasks_per_node, visible, local, mine",
  [
    ("4(x2)", "0,1,2,3", "1", (1,)),  # One process per GPU, all visible.
    ("4(x2)", "0,1,2,3,4,5,6,7", "3", (6, 7)),
    ("4(x2)", "0", "1", ()),  # --gpus-per-task=1: SLURM has bound it.
    ("1(x2)", "0,1,2,3", "0", ()),  # One process per node: all of them, where JAX would take one.
    ("2,4", "0,1,2,3", "2", (2,)),
    ("4(x2)", "", "1", ()),  # CPU
  ],
)
def test_each_slurm_task_takes_its_share_of_the_gpus_it_sees(tasks_per_node, visible, local, mine):
  environ = SLURM | dict(SLURM_STEP_TASKS_PER_NODE=tasks_per_node, CUDA_VISIBLE_DEVICES=visible, SLURM_LOCALID=local)
  assert cluster.find_processes(environ).local_device_ids == mine


def test_a_jobset_gives_coordinator_and_index():
  assert place(cluster.find_processes(JOBSET)) == ("segjax-workers-0-0.segjax:8476", 2, 1, None)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (({}, "a:1", 2, None), "--coordinator, --num_processes given without --process_id"),
    (({}, None, None, 0), "--process_id given without --coordinator, --num_processes"),
    (({}, None, 2, None), "--num_processes given without --coordinator, --process_id"),
    (({}, "a:1", 2, 2), "--process_id=2 with --num_processes=2: ids run from 0"),
    (({}, "a", 2, 1), "--coordinator=a: not host:port"),
    (({}, "auto", 2, None), "Leave the other flags out"),
    (({"JAX_NUM_PROCESSES": "2"},), "JAX_NUM_PROCESSES given without JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
    ((JOBSET | {"JOBSET_NUM_PROCESSES": "two"},), "JOBSET_NUM_PROCESSES='two' is no whole number"),
    ((JOBSET | {"JOB_COMPLETION_INDEX": "2"},), "JOB_COMPLETION_INDEX=2 with JOBSET_NUM_PROCESSES=2"),
    (({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"},), "but SLURM_LOCALID not set. Start .* with srun"),
    (({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, "auto"), "but SLURM_PROCID not set"),
    ((MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": ""},), "but OMPI_COMM_WORLD_LOCAL_RANK not set. Start .* mpirun"),
    ((SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},), "3 GPUs cannot be shared by SLURM_STEP_TASKS_PER_NODE"),
    ((SLURM | {"SLURM_NODEID": "2"},), "has no node 2"),
  ],
)
def test_incomplete_and_contradicting_settings_are_named(arguments, message):
  with pytest.raises(ConfigError, match=message):
    cluster.find_processes(*arguments)


@pytest.mark.parametrize(
  "process_id, message", [(0, "and not all others came"), *full((1, "could not reach the coordinator"))]
)
def test_a_process_that_stays_alone_stops_after_the_stated_time_naming_the_address(process_id, message):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  code = f"""
from segjax.run import cluster, distributed
with distributed.connected(cluster.find_processes({{}}, {address!r}, 2, {process_id}), timeout=3):
  pass
"""
  begin = time.monotonic()
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
  assert result.returncode == 2 and message in result.stderr and address in result.stderr, result.stderr
  assert "within 3 s" in result.stderr or "for 3 s" in result.stderr
  assert "Check failure stack trace" not in result.stderr and time.monotonic() - begin < 60


@pytest.mark.full
@pytest.mark.parametrize("victim, number", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_or_hangs_ends_the_other_within_the_heartbeat_while_it_waits_on_the_host(victim, number):
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  code = f"""
import sys, time
from segjax.run import cluster, distributed
distributed.HEARTBEAT_TIMEOUT = 5
with distributed.connected(cluster.find_processes({{}}, {address!r}, 2, int(sys.argv[1])), timeout=100):
  print("connected", flush=True)
  time.sleep(100)
"""
  both = [
    subprocess.Popen([sys.executable, "-c", code, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  try:
    assert [process.stdout.readline() for process in both] == ["connected\n"] * 2
    both[victim].send_signal(number)
    begin = time.monotonic()
    message = both[1 - victim].communicate(timeout=60)[1]
    assert both[1 - victim].returncode == -signal.SIGABRT and time.monotonic() - begin < 20
    assert "another task died" in message
    assert ("leader" if victim == 0 else "unhealthy (stopped sending heartbeats):\n1\n") in message, message
  finally:
    for process in both:
      process.kill()
      process.communicate()


def test_on_first_is_a_plain_call_on_one_process():
  assert distributed.on_first(lambda: {"a": 1}) == {"a": 1}
  with pytest.raises(ZeroDivisionError):
    distributed.on_first(lambda: 1 / 0)
