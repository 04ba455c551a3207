"""What each launcher's environment says about the processes of a run, and the errors of starting them."""

import socket
import subprocess
import sys
import time

import pytest

from segjax.config import ConfigError
from segjax.run import cluster, distributed

SLURM = dict(
  SLURM_JOB_ID="123456",
  SLURM_STEP_NODELIST="gpu[03-04,7]",
  SLURM_STEP_NUM_TASKS="8",
  SLURM_PROCID="5",
  SLURM_LOCALID="1",
  SLURM_NODEID="1",
  SLURM_STEP_TASKS_PER_NODE="4(x2)",
)
JOBSET = dict(
  JOBSET_COORDINATOR="segjax-workers-0-0.segjax",
  JOBSET_NUM_PROCESSES="2",
  JOB_COMPLETION_INDEX="1",
  KUBERNETES_SERVICE_HOST="10.0.0.1",
)


def place(found):
  return found.coordinator, found.num_processes, found.process_id, found.local_device_ids


@pytest.mark.parametrize(
  "environ",
  [
    {},
    dict(SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_NODELIST="a[1-4]"),  # A batch script without srun.
    dict(SLURM_JOB_ID="7", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),
    dict(JOB_COMPLETION_INDEX="3", KUBERNETES_SERVICE_HOST="10.0.0.1"),  # Any indexed job.
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
  assert place(cluster.find_processes({}, coordinator="auto")) == ("auto", None, None, None)


def test_slurm_gives_first_host_port_of_the_job_and_ids():
  # 123456 % 4096 = 576, and JAX's own detection has the same port for the job.
  assert place(cluster.find_processes(SLURM)) == ("gpu03:62016", 8, 5, None)
  assert cluster.find_processes(SLURM | dict(JAX_COORDINATOR_PORT="999")).coordinator == "gpu03:999"


def test_slurm_agrees_with_the_detection_of_jax():
  from jax._src.clusters import SlurmCluster

  for nodes in ("node001", "node001,host2", "node[001-0015],host2", "node[001,007-015],host2"):
    with pytest.MonkeyPatch.context() as patch:
      for name, value in (SLURM | dict(SLURM_STEP_NODELIST=nodes)).items():
        patch.setenv(name, value)
      theirs = SlurmCluster.get_coordinator_address(None, None)
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
    ("4(x2)", "0", "1", None),  # --gpus-per-task=1: SLURM has bound it.
    ("1(x2)", "0,1,2,3", "0", None),  # One process per node: all of them, where JAX would take one.
    ("2,4", "0,1,2,3", "2", (2,)),
    ("4(x2)", "", "1", None),  # CPU
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
    ((SLURM | {"SLURM_PROCID": "8"},), "SLURM_PROCID=8 with SLURM_STEP_NUM_TASKS=8"),
    ((SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},), "3 GPUs cannot be shared by SLURM_STEP_TASKS_PER_NODE"),
    ((SLURM | {"SLURM_NODEID": "2"},), "has no node 2"),
  ],
)
def test_incomplete_and_contradicting_settings_are_named(arguments, message):
  with pytest.raises(ConfigError, match=message):
    cluster.find_processes(*arguments)


@pytest.mark.parametrize(
  "process_id, message", [(0, "and not all others came"), (1, "could not reach the coordinator")]
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


def test_on_first_is_a_plain_call_on_one_process():
  assert distributed.on_first(lambda: {"a": 1}) == {"a": 1}
  with pytest.raises(ZeroDivisionError):
    distributed.on_first(lambda: 1 / 0)
