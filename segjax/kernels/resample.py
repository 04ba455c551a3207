"""A matrix along the height or the width of a feature map, few of whose numbers are not 0: linear interpolation.

| platform | form | gain | measured by |
|---|---|---|---|
| gpu | weighted sums of gathered rows | with max_pool.py and rounding (compiler.py) 40.2 -> 34.5 GB a step of U-Net-64 on H100; 102.5 -> 97.2 of Xception-65 | benchmarks/accelerators.md, "What was tried" |

It can go when XLA:GPU fuses matrix products with what reads and writes their operands.
"""

import jax
import jax.numpy as jnp
import numpy as np

from segjax import kernels

# Rows that a sum may have; in the gradient where an axis becomes four times as long there are eight.
MOST = 10


def resample(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
  """[B, h, w, C] -> [B, H, w, C] by a [H, h] matrix (axis 1), or [B, h, W, C] by [W, w] (axis 2), in x's type."""
  return kernels.fastest(product, gpu=_on_gpu)(x, matrix, axis)


def product(x, matrix, axis):
  """The plain form. Unlike a gather, its gradient is no scatter, and matrix units like it."""
  spec = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
  return jnp.einsum(spec, jnp.asarray(matrix, x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def _on_gpu(x, matrix, axis):
  @jax.custom_vjp
  def by_taps(x):
    return _sum_of_taps(x, matrix, axis)

  by_taps.defvjp(lambda x: (by_taps(x), None), lambda _, g: (_sum_of_taps(g, matrix.T, axis),))
  return by_taps(x)


def _sum_of_taps(x, matrix, axis):
  """By the numbers of each row that are not 0."""
  taps = (matrix != 0).sum(1).max()
  if taps > MOST:
    return product(x, matrix, axis)
  # Zeros come last in each row; where there are too few others, some of them are added.
  columns = np.argsort(matrix == 0, axis=1, kind="stable")[:, :taps]
  weights = np.take_along_axis(matrix, columns, 1)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  total, shape = 0, [-1 if n == axis else 1 for n in range(x.ndim)]
  for column, weight in zip(columns.T, weights.T):
    rows = x.at[(slice(None),) * axis + (column,)].get(mode="promise_in_bounds")
    total += rows.astype(dtype) * weight.reshape(shape).astype(dtype)
  return total.astype(x.dtype)
