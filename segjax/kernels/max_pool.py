"""Maxima of 2x2 pixels.

| platform | form | gain | measured by |
|---|---|---|---|
| gpu | a gradient of its own, which keeps one byte of each window | with resample.py and rounding (compiler.py) 40.2 -> 34.5 GB a step of U-Net-64 on H100 | benchmarks/accelerators.md, "What was tried" |

It can go when XLA:GPU keeps no comparisons for the backward pass.
"""

import jax
import jax.numpy as jnp

from segjax import kernels


def max_pool_2x2(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B, H/2, W/2, C], of an even height and width.

  Where values tie, the gradient is shared: by both columns of a window, then by both pixels of a column.
  """
  return kernels.fastest(_plain, gpu=_own_gradient)(x)


def _plain(x):
  """Pairwise maxima: the gradient of lax.reduce_window is a select-and-scatter, which is not deterministic on GPU."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // 2, 2, w // 2, 2, c)
  x = jnp.maximum(x[:, :, 0], x[:, :, 1])  # [B, H/2, W/2, 2, C]
  return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


@jax.custom_vjp
def _own_gradient(x):
  return _plain(x)


def _forward(x):
  y = _plain(x)
  return y, _largest(x, y)


def _backward(found, g):
  b, h, w, c = g.shape
  found = found[:, :, None, :, None]
  bit = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
  here, beside = found >> bit & 1, found >> (bit ^ 2) & 1  # Of each pixel, and of the other one of its column.
  columns = (found & 1 | found >> 2 & 1) + (found >> 1 & 1 | found >> 3 & 1)
  share = jnp.where(here == 1, 1 / jnp.maximum(columns * (1 + beside), 1).astype(g.dtype), 0)
  return ((g[:, :, None, :, None] * share).reshape(b, 2 * h, 2 * w, c),)


def _largest(x, y):
  """[B, H/2, W/2, C] uint8: bit 2 i + j is set where pixel (i, j) of a window is its largest."""
  b, h, w, c = y.shape
  windows = x.reshape(b, h, 2, w, 2, c)
  return sum((windows[:, :, i, :, j] == y).astype(jnp.uint8) << 2 * i + j for i in (0, 1) for j in (0, 1))


_own_gradient.defvjp(_forward, _backward)
