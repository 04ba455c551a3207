"""How cost grows with work and with devices; prints the tables of benchmarks/scaling.md.

  python benchmarks/scaling.py --part=work      # times train steps: batch, crop and classes, each on its own
  python benchmarks/scaling.py --part=devices   # compiles train steps for 1 to 8 fake CPU devices; nothing is run

An exponent is the slope of log(cost) over log(number) by least squares: 1 is linear. Times are the best of some calls.
"""

import argparse
import math
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np

from segjax import sharding
from segjax.config import default_config
from segjax.experiment import Experiment
from segjax.tools import programs, step_speed

# Small networks of each kind: (model, its options, the crop).
NETWORKS = {
  "U-Net-16": ("unet", dict(width=16), 128),
  "FCN-8s, width 16": ("fcn", dict(width=16), 128),
  "DeepLabV3+ MobileNetV2": ("deeplab_v3plus", dict(backbone="mobilenet_v2"), 129),
}
BATCH, CLASSES = 2, 21
# What is varied -> multiples of the pixels or images, or classes.
AXES = {"batch": (1, 2, 4, 8), "crop": (1, 2, 3, 4), "classes": (2, 21, 84, 168)}
# The papers' networks. Their collectives do not depend on the crop, so it is small.
PAPERS = {
  "U-Net": ("unet", {}, 64),
  "FCN-8s": ("fcn", {}, 64),
  "DeepLabV3+ Xception-65": ("deeplab_v3plus", {}, 65),
}
DEVICES = (1, 2, 4, 8)
# The model of a data-parallel step's speed-up, of which nothing is measured: collectives in rings behind the computation,
# none of it hidden.
NODE = 8  # Devices joined by NVLink.
NVLINK, NETWORK = 450e9, 50e9  # Bytes/s of a device and direction (H200; one 400 Gbit/s card each).
LATENCY = 20e-6  # Seconds of one collective within a node; a step further for each doubling of nodes.
SPEED = 0.4 * 790e12  # FLOP/s of a device: a share of an H200's peak in bfloat16 that is our goal, not measured.
IMAGES, CROP = 8, 513  # Of each device.
MODELLED = (8, 64, 512)


def make_config(model: str, options: dict, *, batch_size: int, crop: int, classes: int):
  """A training config whose data is not at hand, so that steps run on noise."""
  config = default_config(model=model, data="folder")
  config.data.update(dir="absent", classes=tuple(f"class {n}" for n in range(classes)))
  config.model.update(options)
  config.batch_size, config.crop_size = batch_size, (crop, crop)
  return config


def of_work(seconds: float) -> None:
  """Prints time and memory of a step against each axis."""
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  print("| network | varied | numbers | ms | exponent | temporary, MiB | exponent |\n|---|---|---|---|---|---|---|")
  for name, (model, options, side) in NETWORKS.items():
    for axis, numbers in AXES.items():
      times, memory = [], []
      for n in numbers:
        work = dict(batch_size=BATCH, crop=side, classes=CLASSES)
        work |= {"batch": dict(batch_size=n), "crop": dict(crop=side + 64 * (n - 1)), "classes": dict(classes=n)}[axis]
        measured = step_speed.of_train(make_config(model, options, **work), mesh)
        first = step_speed.timed(measured.run, 2)[-1]
        times.append(1e3 * min(step_speed.timed(measured.run, max(round(seconds / first), 3))))
        memory.append(measured.program.temporary / 2**20)
      sizes = [(side + 64 * (n - 1)) ** 2 for n in numbers] if axis == "crop" else numbers
      cells = [", ".join(f"{x:.0f}" for x in column) for column in (times, memory)]
      slopes = [exponent(sizes, column) for column in (times, memory)]
      label = "pixels" if axis == "crop" else axis
      print(
        f"| {name} | {label} | {', '.join(map(str, sizes))} | {cells[0]} | {slopes[0]:.2f} | {cells[1]} | {slopes[1]:.2f} |",
        flush=True,
      )


def exponent(numbers, costs) -> float:
  """The slope of log(costs) over log(numbers)."""
  return float(np.polyfit(np.log(numbers), np.log(costs), 1)[0])


def of_devices() -> None:
  """Prints the collectives of a step against the number of devices, and what the model makes of them."""
  print("| network | devices | collectives: number, MiB of each device |\n|---|---|---|")
  alone, exchanged = {}, {}
  for name, (model, options, crop) in PAPERS.items():
    for devices in DEVICES:
      config = make_config(model, options, batch_size=BATCH * devices, crop=crop, classes=CLASSES)
      mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
      program = programs.compile_train(Experiment(config, mesh=mesh), config.crop_size)
      found = [f"{kind} {len(sizes)}, {sum(sizes) / 2**20:.1f}" for kind, sizes in program.collectives.items() if sizes]
      print(f"| {name} | {devices} | {'; '.join(found) or 'none'} |", flush=True)
      exchanged[name] = program.collectives["all-reduce"], program.collectives["all-gather"]
    work = 2 * program.multiply_adds / config.batch_size * IMAGES * (CROP / crop) ** 2
    alone[name] = work / SPEED
  print(f"\n| network | step alone, ms | {' | '.join(f'{n} devices' for n in MODELLED)} |")
  print(f"|---|---|{'---|' * len(MODELLED)}")
  for name, seconds in alone.items():
    cells = [f"{n * seconds / (seconds + communication(*exchanged[name], n)):.1f}" for n in MODELLED]
    print(f"| {name} | {1e3 * seconds:.0f} | {' | '.join(cells)} |")


def communication(reduced: list[int], gathered: list[int], devices: int) -> float:
  """Seconds that the collectives of a step take: each a ring within the node, then among the nodes.

  Args:
    reduced: bytes of each all-reduce.
    gathered: of each all-gather's result on `DEVICES[-1]` devices. Each device adds as much, so more gather more.
  """
  nodes = max(devices // NODE, 1)
  all_gathered = sum(gathered) * devices / DEVICES[-1]
  within, among = (NODE - 1) / NODE / NVLINK, (nodes - 1) / nodes / NETWORK / NODE
  latency = (len(reduced) + len(gathered)) * LATENCY * (1 + math.log2(nodes))
  return (2 * sum(reduced) + all_gathered) * (within + among) + latency


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--part", choices=("work", "devices"), required=True)
  parser.add_argument("--seconds", type=float, default=3.0, help="each step is timed for, at least")
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
  of_work(args.seconds) if args.part == "work" else of_devices()


if __name__ == "__main__":
  main()
