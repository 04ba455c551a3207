"""The memory of a long run: flat over steps and evaluations, and not a matter of how many images an evaluation has."""

import json
import os
import pathlib
import platform
import subprocess
import sys

import pytest

from segjax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
PREAMBLE = """
import json, pathlib, sys
import jax
from segjax import config as config_lib, sharding, train
from segjax.experiment import Experiment
from segjax.run import commandline

commandline.keep_freed_memory()  # As the commands do.

def resident_mib():
  fields = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
  return int(fields["VmRSS"].split()[0]) / 1024

config = config_lib.load(sys.argv[1])
"""


def measure(config, tmp_path, code):
  """What `code` prints last, in a process of its own: other tests' memory is no business of this one."""
  config_lib.save(config, tmp_path)
  environ = os.environ | dict(MALLOC_ARENA_MAX="2", XLA_FLAGS="")  # glibc's arenas, one per thread, fill up slowly.
  command = [sys.executable, "-c", PREAMBLE + code, str(tmp_path)]
  run = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=1500)
  assert run.returncode == 0, run.stderr[-3000:]
  return run.stdout.splitlines()[-1]


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_a_step_has_the_memory_of_the_last_one():
  """Page faults of a program with 64 MiB or more of temporaries, by pages of 4 KiB; in a process of its own."""
  code = """
import resource, statistics
import jax, jax.numpy as jnp
from segjax.run import commandline

@jax.jit
def step(x):
  return jax.lax.optimization_barrier(jnp.broadcast_to(x.reshape(-1, 1), (1 << 13, 1 << 13))).sum(0)

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  jax.block_until_ready(step(jnp.arange(1.0 * (1 << 13))))
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

KEEP
# The median: now and then one needs a new block.
print(round(statistics.median(faults() for _ in range(9))))
"""

  def faults(keep):
    program = code.replace("KEEP", keep)
    return int(subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True).stdout)

  anew = faults("")
  assert anew > 0.9 * 2**26 / 2**12
  assert faults("commandline.keep_freed_memory()") < 0.1 * anew


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_2000_steps_and_10_evaluations_add_less_than_2_percent(tiny_config, tmp_path, loader):
  """A whole run with checkpoints; the first 400 steps and 2 evaluations warm up."""
  tiny_config.data.loader, tiny_config.num_steps = loader, 2400
  tiny_config.eval_every = tiny_config.checkpoint_every = 200
  tiny_config.log_every = 50
  code = """
from segjax.run import report
sizes, scalars = {}, report.Writer.scalars
def noted(self, step, values):
  scalars(self, step, values)
  if "val/mean_iou" in values:
    sizes[step] = round(resident_mib(), 1)
report.Writer.scalars = noted
train.train(config, sys.argv[1] + "/run")
print(json.dumps(sizes))
"""
  sizes = {int(step): size for step, size in json.loads(measure(tiny_config, tmp_path, code)).items()}
  print(f"{loader}: resident MiB after evaluations: {sizes}")
  assert len(sizes) == 12
  assert sizes[2400] < 1.02 * sizes[400]


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["tf_data", "grain"])
def test_an_evaluation_of_ten_times_the_images_takes_no_more_memory(tiny_config, tmp_path, loader):
  """Peak over the whole evaluation, images of 1.2 MB so that keeping 900 of them would show (1 GB)."""
  tiny_config.data.loader, tiny_config.data.image_size, tiny_config.eval.batch_size = loader, (640, 640), 2
  code = """
import resource
mesh = sharding.make_mesh(1)
peaks = []
for count in (100, 100, 1000):
  config.data.num_val = count
  experiment = Experiment(config, mesh=mesh)
  experiment.evaluator(experiment.init_state().eval_variables())
  peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(json.dumps(peaks))
"""
  _, few, many = json.loads(measure(tiny_config, tmp_path, code))
  print(f"{loader}: peak {few:.0f} MiB after 100 images, {many:.0f} MiB after 1000")
  assert many < few + 100
