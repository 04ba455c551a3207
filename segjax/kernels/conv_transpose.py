"""Transposed convolution.

| platform | form | gain in training | measured by `python benchmarks/kernels.py` |
|---|---|---|---|
| cpu | one product and a depth-to-space | 6 to 90 times | --only=transposed |

It can go when the gradient of XLA:CPU's own is as fast.

Cure, on every platform: the height of the map is split over all devices or none, see `sharding.split_height`.
"""

import jax
import jax.numpy as jnp

from segjax import kernels, sharding
from segjax.kernels.convolution import matmul


def conv_transpose(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """[B, H, W, in] -> [B, (H - 1) stride + k, (W - 1) stride + k, out].

  Args:
    kernel: [k, k, in, out], k a multiple of the stride; output pixel stride * i + a takes x[i] @ kernel[a].
  """
  form = kernels.fastest(_plain, cpu=_as_one_product)
  rows, out_rows = x.shape[1], (x.shape[1] - 1) * stride + kernel.shape[0]
  return sharding.split_height(form(sharding.split_height(x, out_rows), kernel, stride), rows)


def _plain(x, kernel, stride):
  # lax slides the kernel over the result, so turned by 180 degrees.
  return jax.lax.conv_transpose(
    x, kernel[::-1, ::-1], (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _as_one_product(x, kernel, stride):
  """Each output pixel sees n x n input pixels, n = k / stride: a product over as many shifted copies of x."""
  b, h, w, c = x.shape
  n, out = kernel.shape[0] // stride, kernel.shape[-1]
  h, w = h + n - 1, w + n - 1
  if n > 1:
    x = jnp.pad(x, ((0, 0), (n - 1, n - 1), (n - 1, n - 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(n) for j in range(n)], axis=-1)
  # Of n = 2: output pixel stride * i + a sees x[i - 1] through the kernel's second half and x[i] through its first.
  taps = kernel.reshape(n, stride, n, stride, c, out)[::-1, :, ::-1].transpose(0, 2, 4, 1, 3, 5)
  x = matmul(x, taps.reshape(n * n * c, stride * stride * out)).reshape(b, h, w, stride, stride, out)
  return x.swapaxes(2, 3).reshape(b, h * stride, w * stride, out)
