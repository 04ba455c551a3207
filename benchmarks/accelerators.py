"""What the steps of the shipped networks cost an H100 and a slice of eight TPU v5e, by compiling them for these devices.

  python benchmarks/accelerators.py                              # all rows; each takes minutes, in a process of its own
  python benchmarks/accelerators.py --only='xception65 train bfloat16'   # those whose name this pattern is found in

Needs no accelerator, but JAX's CUDA plugin (pip install 'jax[cuda12]') for the H100 and libtpu for the v5e (TPU_LIBRARY_PATH
names its libtpu.so; one process at a time can use it). Writes the rows it makes to benchmarks/accelerators.json, keeps the
others, and puts the table into benchmarks/accelerators.md. Counts are exact and repeatable; nothing is run.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import time

FIGURES = pathlib.Path(__file__).with_suffix(".json")
PAGE = pathlib.Path(__file__).with_suffix(".md")
# Config, what is set in it, images of a step, their side.
NETWORKS = {
  "xception65": ("deeplab_voc", {}, 16, 513),
  "unet64": ("unet_voc", {}, 8, 512),
  "fcn8s": ("fcn8_voc:8s", {}, 8, 512),
  "mobilenetv2": ("deeplab_voc", {"model.backbone": "mobilenet_v2"}, 16, 513),
}
TITLES = {
  "xception65": "DeepLabV3+ Xception-65", "unet64": "U-Net-64", "fcn8s": "FCN-8s", "mobilenetv2": "DeepLabV3+ MobileNetV2"
}  # fmt: skip
# The most telling first.
NAMES = [
  f"{network} {step} {dtype} {target}"
  for dtype in ("bfloat16", "float32")
  for step in ("train", "eval")
  for target in ("gpu:h100", "tpu:v5e:2x4")
  for network in NETWORKS
]


def measure(name: str) -> dict:
  """The figures of one row, of one device: see `roofline.figures`, and how long its compilation took."""
  from segjax import sharding
  from segjax.config import file as config_file
  from segjax.experiment import Experiment
  from segjax.tools import programs, roofline, targets

  network, step, dtype, target = name.split()
  path, options, batch_size, side = NETWORKS[network]
  config = config_file.load(path)
  config.update_from_flattened_dict(options)
  config.batch_size = config.eval.batch_size = batch_size
  config.crop_size, config.dtype = (side, side), dtype
  mesh = sharding.make_mesh(devices=targets.devices(target))
  program = programs.COMPILE[step](Experiment(config, mesh=mesh, num_classes=21), (side, side))
  known = targets.facts(mesh.devices.flat[0])
  found = roofline.figures(program) | roofline.estimate(program, known)
  versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
  return found | dict(seconds_to_compile=round(program.seconds), date=time.strftime("%Y-%m-%d"), **versions)


def measure_apart(name: str) -> dict:
  """The same in a process of its own.

  Raises:
    RuntimeError: it could not be compiled; with what the process said last.
  """
  # So that the code alone decides what is compiled.
  environ = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
  environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
  command = [sys.executable, __file__, f"--row={name}"]
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
  if done.returncode:
    raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def load() -> dict[str, dict]:
  """{name: figures} of the rows that were made."""
  return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def table(rows: dict[str, dict]) -> str:
  """All rows as Markdown, in the order of `NAMES`."""
  lines = [
    "| step | memory traffic, GB | products, TFLOP | peak, GiB | fusions | collectives | cycles, M | memory, matrix: ms |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name in (name for name in sorted(NAMES, key=lambda name: name.split()[::-1]) if name in rows):
    row, (network, step, dtype, target) = rows[name], name.split()
    batch, side = NETWORKS[network][2:]
    collectives = [f"{n} {kind} ({size / 2**20:.1f} MiB)" for kind, (n, size) in row["collectives"].items()]
    lines.append(
      f"| {TITLES[network]} {batch}x{side}x{side}, {step}, {dtype}, {target} | {row['hbm_bytes'] / 1e9:.2f}"
      f" | {sum(row['flops'].values()) / 1e12:.3f} | {row['peak_bytes'] / 2**30:.2f} | {row['fusions']:,}"
      f" | {', '.join(collectives) or '-'} | {row['cycles'] / 1e6:.1f}"
      f" | {1e3 * row['hbm_seconds']:.1f}, {1e3 * row['matrix_seconds']:.1f} |"
    )
  return "\n".join(lines)


def save(rows: dict[str, dict]) -> None:
  """Writes the figures, and the table into the page."""
  FIGURES.write_text(json.dumps({name: rows[name] for name in NAMES if name in rows}, indent=1) + "\n")
  before, mark, _ = PAGE.read_text().partition("## Table\n")
  PAGE.write_text(f"{before}{mark}\n{table(rows)}\n")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default="", help="pattern (re) of the names of rows: NETWORK train|eval DTYPE TARGET")
  parser.add_argument("--list", action="store_true", help="print the names and stop")
  parser.add_argument("--row", choices=NAMES, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.row:
    print(json.dumps(measure(args.row)))
    return
  names = [name for name in NAMES if re.search(args.only, name)]
  for name in names:
    print(name, flush=True)
    if not args.list:
      figures = measure_apart(name)
      print(f"  {json.dumps(figures)}", flush=True)
      save(load() | {name: figures})
  if not names:
    sys.exit(f"--only={args.only}: no row has such a name; --list has them.")


if __name__ == "__main__":
  main()
