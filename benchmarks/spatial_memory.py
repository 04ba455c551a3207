"""Memory of a device when the image height is split: DeepLabV3+ on Xception-65, compiled for fake CPU devices.

  python benchmarks/spatial_memory.py                          # all six; prints the rows of benchmarks/spatial.md
  python benchmarks/spatial_memory.py --case=train --space=2   # one

Nothing is computed: the numbers are the compiler's (`memory_analysis`). `temp` is what a step holds beside its
arguments and results: the activations.
"""

import argparse
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 " + os.environ.get("XLA_FLAGS", "")

import jax

from segjax import sharding
from segjax.config import default_config
from segjax.experiment import Experiment
from segjax.tools import programs

CASES = {"eval": (1024, 2048), "train": (769, 769)}  # (H, W) of the image, of the crop.
CANVAS = (1024, 2048)


def compile_program(case: str, space: int) -> programs.Program:
  """The compiled step for one image on `space` devices; of training for two, as batch norm after pooling needs."""
  config = default_config(model="deeplab_v3plus", data="synthetic")
  config.crop_size, config.batch_size, config.eval.batch_size = CASES[case], 2, 1
  mesh = sharding.make_mesh(1, space, devices=jax.devices()[:space])
  return programs.COMPILE[case](Experiment(config, mesh=mesh, num_classes=19), CANVAS)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--case", choices=CASES, action="append")
  parser.add_argument("--space", type=int, choices=(1, 2, 4), action="append")
  args = parser.parse_args()
  print(f"jax {jax.__version__}")
  print("| step | space | temp, MiB | arguments, MiB | peak, MiB | collectives (number, MiB) |")
  print("|---|---|---|---|---|---|")
  for case in args.case or CASES:
    for space in args.space or (1, 2, 4):
      program = compile_program(case, space)
      temp, arguments, peak = (f"{n / 2**20:.0f}" for n in (program.temporary, program.arguments, program.peak))
      found = {kind: sizes for kind, sizes in program.collectives.items() if sizes}
      found = ", ".join(f"{kind} {len(sizes)}, {sum(sizes) / 2**20:.0f}" for kind, sizes in found.items())
      size = "x".join(map(str, CASES[case]))
      print(f"| {case} {size} | {space} | {temp} | {arguments} | {peak} | {found or 'none'} |", flush=True)


if __name__ == "__main__":
  main()
