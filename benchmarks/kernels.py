"""Times the forms of segjax's kernels in turn: python benchmarks/kernels.py [--only=depthwise,...] [--dtype=bfloat16]

Prints the rows of benchmarks/kernels.md: forward, and forward with all gradients, as the best of some calls, all forms of a
row in turn, compiled and run as a step of training. The first form of each row is the one that segjax has; "default" is XLA's
without the compiler's options that segjax sets. The tests compare their values and gradients.
"""

import argparse
import functools
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from segjax import kernels, losses, metrics, steps
from segjax.augment import color
from segjax.kernels import compiler, convolution, depthwise
from segjax.models import layers, resize
from segjax.models.backbones import resnet
from segjax.run import commandline

ORDER = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, *, stride=1, rate=1, groups=1):
  """XLA's own convolution with its own gradients, TensorFlow's padding."""
  padding = layers.paddings(x.shape[1:3], kernel.shape[0], stride, rate, "same")
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, rhs_dilation=(rate, rate), dimension_numbers=ORDER, feature_group_count=groups
  )


def as_layer(layer: nnx.Module) -> Callable:
  """A layer with one kernel as a function of its input and that kernel."""
  graphdef, name = nnx.graphdef(layer), next(iter(nnx.to_pure_dict(nnx.state(layer, nnx.Param))))
  return lambda x, kernel: nnx.merge(graphdef, {name: kernel}, copy=True)(x)


def without_winograd(form: Callable) -> Callable:
  """A form as it would be if Winograd's sums never paid."""

  def traced(*args):
    with mock.patch.object(convolution, "_saved_by_winograd", lambda *_: 0.0):
      return form(*args)

  return traced


def dense(size, features, kernel_size=3, *, rate=1, batch=2):
  """A row of dense convolutions."""
  of, to = features
  layer = layers.Conv(of, to, kernel_size, rate=rate, rngs=nnx.Rngs(0))
  plain = functools.partial(convolve, rate=rate)
  forms = {"segjax": as_layer(layer), "xla": plain, "default": plain}
  if kernel_size == 1:
    forms["dot"] = lambda x, kernel: jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])
    forms["flat dot"] = lambda x, kernel: (x.reshape(-1, of) @ kernel[0, 0]).reshape(*x.shape[:3], to)
  if kernel_size == 3 and rate == 1 and min(features) >= 64:  # Where segjax has Winograd's sums.
    forms["no sums"] = without_winograd(forms["segjax"])
  name = f"conv {kernel_size}x{kernel_size} {of}->{to}" + (f" rate {rate}" if rate > 1 else "")
  return name, [(batch, *size, of), (kernel_size, kernel_size, of, to)], forms


def separable(size, features, *, stride=1, rate=1, batch=2):
  """A row of depthwise convolutions."""
  layer = layers.DepthwiseConv(features, stride=stride, rate=rate, rngs=nnx.Rngs(0))
  forms = {"segjax": as_layer(layer), "xla": functools.partial(convolve, stride=stride, rate=rate, groups=features)}
  name = f"depthwise 3x3 {features}" + f" stride {stride}" * (stride > 1) + f" rate {rate}" * (rate > 1)
  if stride == 1:
    whole = lambda x, kernel: depthwise._shifted(x, kernel, stride=1, rate=rate, padding=((rate, rate),) * 2)  # noqa: E731
    forms["shifts, autodiff"] = whole
  return name, [(batch, *size, features), (3, 3, 1, features)], forms


def normalising(size, features, batch=2):
  """A row of batch norms with ReLU."""
  graphdef, variables = nnx.split(layers.BatchNorm(features))

  def ours(x):
    return nnx.merge(graphdef, variables, copy=True)(x, True, jax.nn.relu)

  def autodiff(x):
    mean = x.mean((0, 1, 2), keepdims=True)
    return jax.nn.relu((x - mean) * lax.rsqrt(jnp.square(x - mean).mean((0, 1, 2), keepdims=True) + 1e-5))

  return f"batch norm, ReLU {features}", [(batch, *size, features)], {"segjax": ours, "autodiff": autodiff}


def pooling(size, features, window, batch=2):
  """A row of max-pools."""
  ours = {2: layers.max_pool_2x2, 3: resnet.max_pool_3x3}[window]

  def xla(x):
    padding = [(0, 0), *[(0, 0) if window == 2 else (1, 1)] * 2, (0, 0)]
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, window, window, 1), (1, 2, 2, 1), padding)

  return f"max-pool {window}x{window} {features}", [(batch, *size, features)], {"segjax": ours, "xla": xla}


def transposed(size, features, stride, batch=2):
  """A row of transposed convolutions, kernel 2 stride."""
  layer = layers.ConvTranspose(features, features, stride, kernel_init=layers.he_normal, rngs=nnx.Rngs(0))

  def xla(x, kernel):
    return lax.conv_transpose(x, kernel[::-1, ::-1], (stride, stride), "VALID", dimension_numbers=ORDER)

  shape = (2 * stride, 2 * stride, features, features)
  name = f"transposed conv {2 * stride}x{2 * stride} {features}"
  return name, [(batch, *size, features), shape], {"segjax": as_layer(layer), "xla": xla}


def up(size, features, batch=4):
  """A row of the U-Net's up-convolutions."""
  layer = layers.ConvTranspose2x2(features, features // 2, rngs=nnx.Rngs(0))
  graphdef = nnx.graphdef(layer)

  def ours(x, kernel):
    return nnx.merge(graphdef, dict(kernel=kernel, bias=jnp.zeros(features // 2, x.dtype)), copy=True)(x)

  def xla(x, kernel):
    return lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID", dimension_numbers=ORDER)

  return (
    f"up-conv 2x2 {features}",
    [(batch, *size, features), (2, 2, features, features // 2)],
    {"segjax": ours, "xla": xla},
  )


def resizing(size, to, features, batch=2):
  """A row of bilinear resizing."""

  def gathered(x):
    for axis, n in ((1, to[0]), (2, to[1])):
      position = np.linspace(0, x.shape[axis] - 1, n)
      low = np.minimum(position.astype(int), x.shape[axis] - 2)
      weight = jnp.asarray((position - low).reshape([n if a == axis else 1 for a in range(4)]), x.dtype)
      x = jnp.take(x, low, axis) * (1 - weight) + jnp.take(x, low + 1, axis) * weight
    return x

  ours = functools.partial(resize.resize_bilinear, size=to)
  return f"resize to {to[0]}x{to[1]} {features}", [(batch, *size, features)], {"segjax": ours, "gathered": gathered}


def counting(size, classes, batch=4):
  """A row of confusion matrices."""

  def one_hot(label, prediction):
    hot = [jax.nn.one_hot(x.reshape(batch, -1), classes, dtype=jnp.float32) for x in (label, prediction)]
    return jnp.einsum("bpi,bpj->bij", *hot).sum(0).astype(jnp.int32)

  def compared(label, prediction):
    cell = (label.astype(jnp.int32) * classes + prediction).reshape(batch, -1)
    return jnp.stack([(cell == n).sum() for n in range(classes**2)]).reshape(classes, classes)

  ours = functools.partial(metrics.confusion_matrix, num_classes=classes)
  forms = {"segjax": ours, "one-hot matmul": one_hot}
  if classes < 10:
    forms["comparisons"] = compared
  return f"confusion matrix {classes}", [(batch, *size)] * 2, forms


def sweeping(size, batch):
  """A row of confusion matrices at all thresholds of an evaluation with one logit."""
  label = jax.random.choice(jax.random.key(1), jnp.array([0, 1, 255], jnp.uint8), (batch, *size))

  def one_by_one(logits):
    probability = jax.nn.sigmoid(logits)
    return jnp.stack([metrics.confusion_matrix(label, probability > t, 2) for t in steps.THRESHOLDS])

  def ours(logits):
    return metrics.confusion_at_thresholds(label, jax.nn.sigmoid(logits), steps.THRESHOLDS)

  return f"threshold sweep {len(steps.THRESHOLDS)}", [(batch, *size)], {"segjax": ours, "a matrix each": one_by_one}


def scoring(size, classes, batch):
  """A row of cross-entropies."""
  label = jax.random.randint(jax.random.key(1), (batch, *size), 0, classes).astype(jnp.uint8)

  def ours(logits):
    return losses.softmax_cross_entropy(logits, label, ignore_label=255)

  def summed(logits):
    of_label = jnp.where(jax.nn.one_hot(label, classes, dtype=bool), logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, axis=-1) - of_label).mean()

  return f"cross-entropy {classes}", [(batch, *size, classes)], {"segjax": ours, "sum over classes": summed}


def turning_hue(size, batch=16):
  """A row of the costliest of the augmentation's colours, as bytes: nobody takes its gradients."""

  def by_remainder(image):
    sector, chroma, value = color._hue_chroma_value(image)
    k = (jnp.array([5.0, 3.0, 1.0], image.dtype).reshape(1, 1, 1, 3) + sector[..., None] + 6 * 0.1) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

  ours = jax.vmap(lambda image: color.shift_hue(image, 0.1))
  forms = {"segjax": ours, "remainder": by_remainder}
  return (
    "hue",
    [(batch, *size, 3)],
    {name: lambda x, form=form: form(x).astype(jnp.uint8) for name, form in forms.items()},
  )


# Shapes of the networks at the sizes that benchmarks/README.md compares with PyTorch.
ROWS = {
  "depthwise": [
    lambda: separable((129, 129), 128),
    lambda: separable((65, 65), 256),
    lambda: separable((17, 17), 728),
    lambda: separable((129, 129), 128, stride=2),
    lambda: separable((17, 17), 2048, rate=6),
  ],
  "pointwise": [
    lambda: dense((129, 129), (64, 128), 1),
    lambda: dense((65, 65), (304, 256), 1),
    lambda: dense((17, 17), (728, 728), 1),
    lambda: dense((17, 17), (1536, 2048), 1),
  ],
  "conv": [
    lambda: dense((257, 257), (3, 32)),
    lambda: dense((256, 256), (64, 64), batch=4),
    lambda: dense((64, 64), (256, 256), batch=4),
    lambda: dense((16, 16), (1024, 1024), batch=4),
    lambda: dense((128, 128), (16, 16), batch=16),
  ],
  "dilated": [
    lambda: dense((33, 33), (256, 256), rate=2),
    lambda: dense((33, 33), (512, 256), rate=12),
    lambda: dense((33, 33), (512, 256), rate=18),
  ],
  "fc6": [lambda: dense((6, 8), (256, 2048), 7, batch=4), lambda: dense((7, 7), (512, 4096), 7)],
  "norm": [
    lambda: normalising((129, 129), 128),
    lambda: normalising((17, 17), 728),
    lambda: normalising((128, 128), 16, 16),
  ],
  "pool": [
    lambda: pooling((256, 256), 64, 2, 4),
    lambda: pooling((64, 64), 256, 2, 4),
    lambda: pooling((129, 129), 64, 3),
  ],
  "transposed": [
    lambda: transposed((15, 15), 21, 2),
    lambda: transposed((60, 60), 21, 8),
    lambda: transposed((30, 30), 21, 16),
    lambda: up((16, 16), 1024),
    lambda: up((128, 128), 128),
  ],
  "resize": [lambda: resizing((17, 17), (65, 65), 256), lambda: resizing((65, 65), (257, 257), 21)],
  "confusion": [lambda: counting((513, 513), 21), lambda: counting((512, 512), 2)],
  "sweep": [lambda: sweeping((1280, 1918), 2)],
  "loss": [lambda: scoring((128, 128), 21, 16), lambda: scoring((513, 513), 21, 2)],
  "hue": [lambda: turning_hue((128, 128))],
}


def programs(forms: dict, arguments: list, names: tuple[str, ...]):
  """{(form, "forward" or "backward"): a compiled call}, arguments bound."""
  platform = jax.devices()[0].platform
  out = jax.eval_shape(next(iter(forms.values())), *arguments)
  found = {}
  for form in names:
    function = forms[form]
    options = {} if form == "default" else compiler.options("train", platform)
    function = kernels.on(platform)(function)
    compiled = jax.jit(function, compiler_options=options).lower(*arguments).compile()
    found[form, "forward"] = functools.partial(compiled, *arguments)
    if jnp.issubdtype(out.dtype, jnp.floating):
      weight = jax.random.normal(jax.random.key(9), out.shape, out.dtype)

      def both(weight, *arguments, function=function):
        value, pull = jax.vjp(function, *arguments)
        return value, pull(weight)

      compiled = jax.jit(both, compiler_options=options).lower(weight, *arguments).compile()
      found[form, "backward"] = functools.partial(compiled, weight, *arguments)
  return found


def best_times(calls: dict, seconds: float) -> dict:
  """Best milliseconds of each call, in turn."""
  best = {}
  for call in calls.values():
    jax.block_until_ready(call())
  begin = time.perf_counter()
  while time.perf_counter() - begin < seconds or len(best) < len(calls):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      best[name] = min(best.get(name, np.inf), 1e3 * (time.perf_counter() - start))
  return best


def make_arguments(shapes, dtype, integer: int = 0) -> list:
  """Normal noise, or whole numbers below `integer`."""
  keys = jax.random.split(jax.random.key(0), len(shapes))
  if integer:
    return [jax.random.randint(key, shape, 0, integer).astype(jnp.uint8) for key, shape in zip(keys, shapes)]
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", default=",".join(ROWS), help="kernels, comma-separated")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--seconds", type=float, default=4.0, help="per row, at least")
  args = parser.parse_args()
  commandline.keep_freed_memory()
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}\n")
  print("| kernel | input | form: forward, ms | form: forward and gradients, ms |\n|---|---|---|---|")
  for kernel in args.only.split(","):
    for row in ROWS[kernel]:
      name, shapes, forms = row()
      classes = int(name.split()[-1]) if kernel == "confusion" else 0
      arguments = make_arguments(shapes, args.dtype, classes)
      times = best_times(programs(forms, arguments, tuple(forms)), args.seconds)
      cells = [
        ", ".join(f"{form} {times[form, which]:.3g}" for form in forms if (form, which) in times)
        for which in ("forward", "backward")
      ]
      print(f"| {name} | {'x'.join(map(str, shapes[0]))} | {cells[0]} | {cells[1] or '-'} |", flush=True)


if __name__ == "__main__":
  main()
