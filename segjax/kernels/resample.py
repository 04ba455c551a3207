"""A matrix along the height or the width of a feature map, few of whose numbers are not 0: linear interpolation.

| platform | form | gain | measured by |
|---|---|---|---|
| gpu | weighted sums of gathered rows | with max_pool.py 40.2 -> 34.5 GB a step of U-Net-64 on H100; 102.5 -> 97.2 of Xception-65 | benchmarks/accelerators.md, "What was tried" |

It can go when XLA:GPU fuses matrix products with what reads and writes their operands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from segjax import kernels

# Rows that a sum may have: those of the gradient where an axis becomes four times as long.
MOST = 10


def resample(x: jax.Array, matrix: np.ndarray, axis: int) -> jax.Array:
  """[B, h, w, C] -> [B, H, w, C] by a [H, h] matrix (axis 1), or [B, h, W, C] by [W, w] (axis 2), in x's type."""
  return kernels.fastest(_product, gpu=_on_gpu)(x, matrix, axis)


def _product(x, matrix, axis):
  """Unlike a gather, its gradient is no scatter, and matrix units like it."""
  spec = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
  return jnp.einsum(spec, jnp.asarray(matrix, x.dtype), x, precision=jax.lax.Precision.HIGHEST)


class _Matrix:
  """Compared by its numbers, as a static argument must be."""

  def __init__(self, numbers: np.ndarray):
    self.numbers, self._key = numbers, (numbers.shape, numbers.tobytes())

  def __eq__(self, other):
    return self._key == other._key

  def __hash__(self):
    return hash(self._key)


def _on_gpu(x, matrix, axis):
  return _taps(x, _Matrix(matrix), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _taps(x, matrix, axis):
  return _sum_of_taps(x, matrix.numbers, axis)


def _forward(x, matrix, axis):
  return _taps(x, matrix, axis), None


def _backward(matrix, axis, _, g):
  return (_sum_of_taps(g, matrix.numbers.T, axis),)


_taps.defvjp(_forward, _backward)


def _sum_of_taps(x, matrix, axis):
  """By the numbers of each row that are not 0."""
  taps = (matrix != 0).sum(1).max()
  if taps > MOST:
    return _product(x, matrix, axis)
  # Zeros come last in each row; where there are too few others, some of them are added.
  columns = np.argsort(matrix == 0, axis=1, kind="stable")[:, :taps]
  weights = np.take_along_axis(matrix, columns, 1)
  total, shape = 0, [-1 if n == axis else 1 for n in range(x.ndim)]
  for column, weight in zip(columns.T, weights.T):
    rows = (
      x.at[(slice(None),) * axis + (column,)]
      .get(mode="promise_in_bounds")
      .astype(jnp.promote_types(x.dtype, jnp.float32))
    )
    total += rows * weight.reshape(shape).astype(rows.dtype)
  return total.astype(x.dtype)
