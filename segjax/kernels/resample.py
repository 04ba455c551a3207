"""Matrices along the height and the width of a feature map, few of whose numbers are not 0: linear interpolation.

| platform | form | gain | measured by |
|---|---|---|---|
| gpu | weighted sums of gathered pixels | with max_pool.py and rounding (compiler.py) 40.2 -> 34.5 GB a step of U-Net-64 on H100, 102.5 -> 97.2 of Xception-65; both axes at once 34.1 -> 33.4 of U-Net-64 | benchmarks/accelerators.md, "What was tried" |

It can go when XLA:GPU fuses matrix products with what reads and writes their operands.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from segjax import kernels

# Pixels that a sum may have: where both axes become twice as long, so many in the gradient.
MOST = 16
Matrices = tuple[tuple[int, np.ndarray], ...]


def resample(x: jax.Array, matrices: Matrices) -> jax.Array:
  """[B, h, w, C] -> [B, H, W, C] in x's type.

  Args:
    matrices: (1, [H, h]), (2, [W, w]), or one of them: an axis and what it is multiplied by.
  """
  return kernels.fastest(product, gpu=_on_gpu)(x, matrices)


def product(x, matrices: Matrices):
  """The plain form. Unlike a gather, its gradient is no scatter, and matrix units like it."""
  for axis, matrix in matrices:
    spec = "oh,bhwc->bowc" if axis == 1 else "ow,bhwc->bhoc"
    x = jnp.einsum(spec, jnp.asarray(matrix, x.dtype), x, precision=jax.lax.Precision.HIGHEST)
  return x


def _on_gpu(x, matrices):
  @jax.custom_vjp
  def by_taps(x):
    return _by_taps(x, matrices)

  transposed = tuple((axis, matrix.T) for axis, matrix in reversed(matrices))
  by_taps.defvjp(lambda x: (by_taps(x), None), lambda _, g: (_by_taps(g, transposed),))
  return by_taps(x)


def _by_taps(x, matrices: Matrices):
  """In one sum, or one axis after the other where that has too many pixels."""
  taps = math.prod(_taps(matrix) for _, matrix in matrices)
  if taps <= MOST:
    return _sum_of_taps(x, matrices).astype(x.dtype)
  if len(matrices) == 1:
    return product(x, matrices)
  for one in matrices:
    x = _by_taps(x, (one,))
  return x


def _taps(matrix: np.ndarray) -> int:
  """Numbers that are not 0, in the row with most of them."""
  return (matrix != 0).sum(1).max()


def _sum_of_taps(x, matrices: Matrices):
  """In float32 at least."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if not matrices:
    return x.astype(dtype)
  (axis, matrix), *others = matrices
  # Zeros come last in each row; where there are too few others, some of them are added.
  columns = np.argsort(matrix == 0, axis=1, kind="stable")[:, : _taps(matrix)]
  weights = np.take_along_axis(matrix, columns, 1)
  total, shape = 0, [-1 if n == axis else 1 for n in range(x.ndim)]
  for column, weight in zip(columns.T, weights.T):
    rows = x.at[(slice(None),) * axis + (column,)].get(mode="promise_in_bounds")
    total += _sum_of_taps(rows, others) * weight.reshape(shape).astype(dtype)
  return total
