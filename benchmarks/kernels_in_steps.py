"""What each kernel of segjax/kernels brings to whole steps: python benchmarks/kernels_in_steps.py [--only=unet16,...]

Compiles a step of training as it is and once more without each kernel that it has, and runs them in turn, all in one
process. Prints the rows of benchmarks/kernels.md, "In whole steps": the median of a step without the kernel over the median
of the step as it is, both of the same rounds. A step that a kernel is not in is left out: its compiled program is the same.
"""

import argparse
import contextlib
import time
from unittest import mock

import jax
import numpy as np

from segjax import sharding
from segjax.config import file as config_file
from segjax.kernels import batch_norm, compiler, conv_transpose, convolution, depthwise
from segjax.run import commandline
from segjax.tools import step_speed


def pointwise_as_convolution(x, kernel, *, stride, rate, padding):
  """convolution._on_cpu without its own product for kernels of 1x1."""
  options = dict(stride=stride, rate=rate, padding=padding)
  fast = convolution._fast_forms(x, kernel, stride, rate, padding) if kernel.shape[0] > 1 else convolution.XLA
  return convolution._by_forms(x, kernel, fast, tuple(options.items()))


def gradient_by_autodiff(by, x, scale, bias, epsilon, activation):
  """Batch norm whose gradient is autodiff's."""
  return batch_norm._plain(x, scale, bias, epsilon, activation)


# What a step is without each kernel: (module, name, what stands there instead).
WITHOUT = {
  "products over patches": (convolution, "PATCHES", convolution.XLA),
  "Winograd": (convolution, "_saved_by_winograd", lambda *_: 0.0),
  "feature maps computed before": (convolution, "_after_maps", lambda form, *maps, **options: form(*maps, **options)),
  "transposed convolution as one product": (conv_transpose, "_as_one_product", conv_transpose._plain),
  "depthwise by shifts": (depthwise, "ON_CPU", depthwise.PLAIN),
  "depthwise kernel gradient by rows": (
    depthwise,
    "ON_CPU",
    depthwise._Forms(depthwise._shifted, depthwise._kernel_gradient_by_sums),
  ),
  "batch norm in one loop": (batch_norm, "_FORMS", batch_norm._FORMS | {"cpu": batch_norm._IN_TWO_PASSES}),
  "1x1 as one product": (convolution, "_on_cpu", pointwise_as_convolution),
  "batch norm's own gradient": (batch_norm, "_own_gradient", gradient_by_autodiff),
  "compiler's libraries and barriers": (compiler, "options", lambda kind, platform: {}),
}
STEPS = {
  "unet16": ("unet_voc", (128, 128), 16, dict(up="transposed", width=16)),
  "unet64": ("unet_voc", (256, 256), 2, dict(up="transposed")),
  "fcn8": ("fcn8_voc", (224, 224), 2, dict(upsampling="learned")),
  "xception65": ("deeplab_voc", (257, 257), 2, {}),
}


def config_of(step: str):
  """A config without a data set: the step runs on noise."""
  name, size, batch_size, model = STEPS[step]
  config = config_file.load(f"configs/{name}.py")
  config.crop_size, config.batch_size, config.data.dir, config.data.loader = size, batch_size, "absent", "grain"
  config.model.update(model)
  return config


def compiled(step: str, mesh, change) -> step_speed.Measured:
  """A step with one kernel replaced while it is traced; no trace of another is reused."""
  jax.clear_caches()
  with mock.patch.object(*change) if change else contextlib.nullcontext():
    return step_speed.of_train(config_of(step), mesh)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default=",".join(STEPS), help="steps, comma-separated")
  parser.add_argument("--rounds", type=int, default=12, help="of one step of each in turn; the first is not counted")
  args = parser.parse_args()
  commandline.keep_freed_memory()
  jax.config.update("jax_enable_compilation_cache", False)
  mesh = sharding.make_mesh(1, 1)
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32, {args.rounds} rounds\n", flush=True)
  print(
    "| step | without | ms with | ms without | ratio (p25-p75 of rounds) | MiB with | MiB without |\n|---|---|---|---|---|---|---|",
    flush=True,
  )
  for step in args.only.split(","):
    base = compiled(step, mesh, None)
    text = base.program.compiled.as_text()
    steps = {"as it is": base}
    for name, change in WITHOUT.items():
      other = compiled(step, mesh, change)
      if _without_names(other.program.compiled.as_text()) != _without_names(text):
        steps[name] = other
    times = {name: [] for name in steps}
    for _ in range(args.rounds):
      for name, measured in steps.items():
        start = time.perf_counter()
        measured.run()
        times[name].append(time.perf_counter() - start)
    ours = 1e3 * np.array(times.pop("as it is")[1:])
    for name, seconds in times.items():
      without = 1e3 * np.array(seconds[1:])
      low, middle, high = np.percentile(without / ours, (25, 50, 75))
      print(
        f"| {step} | {name} | {np.median(ours):.0f} | {np.median(without):.0f} | {middle:.2f} ({low:.2f}-{high:.2f})"
        f" | {mebibytes(base)} | {mebibytes(steps[name])} |",
        flush=True,
      )


def mebibytes(measured: step_speed.Measured) -> str:
  """The temporary memory of a step."""
  return f"{measured.program.temporary / 2**20:,.0f}"


def _without_names(text: str) -> str:
  """A program's text without where each operation comes from."""
  return "\n".join(line.split(", metadata=")[0] for line in text.splitlines() if " = " in line)


if __name__ == "__main__":
  main()
