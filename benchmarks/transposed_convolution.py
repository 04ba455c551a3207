"""Times layers.ConvTranspose against lax.conv_transpose: compilation, forward, forward and gradient.

python benchmarks/transposed_convolution.py
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.models import layers

# (height, width, channels, stride) of the FCN's layers for two images of about 480x480.
CASES = {"FCN-8s upscore_fc7": (15, 15, 21, 2), "FCN-8s upscore": (60, 60, 21, 8), "FCN-16s upscore": (30, 30, 21, 16)}


def plain(x, kernel, stride):
  order = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_transpose(x, kernel[::-1, ::-1], (stride, stride), "VALID", dimension_numbers=order)


def milliseconds(function, *arguments):
  """Best of five calls."""
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)
  return 1e3 * min(times)


def main():
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch 2, float32")
  for name, (height, width, channels, stride) in CASES.items():
    layer = layers.ConvTranspose(channels, channels, stride, kernel_init=layers.he_normal, rngs=nnx.Rngs(0))
    graphdef, kernel = nnx.graphdef(layer), layer.kernel[...]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, height, width, channels)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(2, (height + 1) * stride, (width + 1) * stride, channels)), jnp.float32)
    forms = {
      "segjax": lambda x, k, graphdef=graphdef: nnx.merge(graphdef, {"kernel": k}, copy=True)(x),
      "lax": lambda x, k, stride=stride: plain(x, k, stride),
    }
    for form, function in forms.items():
      start = time.perf_counter()
      gradient = jax.jit(jax.grad(lambda x, k, w, f=function: (f(x, k) * w).sum(), (0, 1))).lower(x, kernel, weight)
      gradient = gradient.compile()
      compilation = time.perf_counter() - start
      forward = jax.jit(function).lower(x, kernel).compile()
      print(
        f"{name:<20} {height}x{width}x{channels} stride {stride:<2} {form:<6} compile {compilation:.2f} s, forward"
        f" {milliseconds(forward, x, kernel):.1f} ms, forward + gradient {milliseconds(gradient, x, kernel, weight):.1f} ms",
        flush=True,
      )


if __name__ == "__main__":
  main()
