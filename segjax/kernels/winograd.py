"""A form of convolution.py for CPU: 3x3 convolutions with half the multiplications (Winograd 1980; Lavin & Gray 2015, arXiv 1509.09308: F(4, 3) along height).

Four rows of the result depend on six rows of the map. Of these rows there are six sums, and six of the kernel's rows, whose
products alone give the four: six convolutions of 1x3, each on a quarter of the rows, so 18 multiplications where there were 36.
Along both axes there would be 9, with errors five times as large, and more to write than the multiplications are worth.

The error in float32 is some three times that of the plain form, 1e-6 of the result (tests/test_convolution.py).
"""

import jax
import jax.numpy as jnp
import numpy as np

Padding = tuple[tuple[int, int], tuple[int, int]]  # ((top, bottom), (left, right)) in pixels.
# Cook-Toom at the points 0, 1, -1, 2, -2 and infinity.
OF_MAP = np.array([
  [4, 0, -5, 0, 1, 0],
  [0, -4, -4, 1, 1, 0],
  [0, 4, -4, -1, 1, 0],
  [0, -2, -1, 2, 1, 0],
  [0, 2, -1, -2, 1, 0],
  [0, 4, 0, -5, 0, 1],
])  # fmt: skip
OF_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
OF_RESULT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
TILE, SUMS = OF_RESULT.shape


def conv(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
  """Convolution of [B, H, W, in] with [3, 3, in, out], stride 1, at most 2 zeros on each side of x."""
  return _conv(x, list(kernel), padding)


def input_gradient(g: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
  """Gradient of a loss by the x of `conv(x, kernel, padding)`, given g: the loss' by its result."""
  to_zeros = tuple((2 - before, 2 - after) for before, after in padding)
  return _conv(g, list(kernel[::-1, ::-1].swapaxes(2, 3)), to_zeros)


def _conv(x, kernel, padding):
  height = x.shape[1] + sum(padding[0]) - 2
  parts = _sums(OF_MAP, _rows_of_tiles(x, padding[0][0], height))
  products = [_along_width(part, row, padding[1]) for part, row in zip(parts, _sums(OF_KERNEL, kernel))]
  # The four rows as one array, whose coefficients differ from row to row: stacked, they would be copied once more.
  of_result = OF_RESULT.T.astype(x.dtype)[:, None, None, :, None, None]  # SUMS of [1, 1, TILE, 1, 1]
  rows = sum(coefficients * product[:, :, None] for coefficients, product in zip(of_result, products))
  return rows.reshape(x.shape[0], -1, *rows.shape[-2:])[:, :height]


def _rows_of_tiles(x, top, height):
  """The first rows of what each tile of the result depends on, their second rows, ...: SUMS arrays [B, tiles, W, in]."""
  tiles = -(-height // TILE)
  x = jnp.pad(x, ((0, 0), (top, TILE * tiles + 2 - top - x.shape[1]), (0, 0), (0, 0)))
  x = jax.lax.optimization_barrier(x)  # Else XLA computes what x comes from once for each sum.
  return [x[:, n : n + TILE * (tiles - 1) + 1 : TILE] for n in range(SUMS)]


def _sums(matrix, parts):
  """The product of a matrix and a list of arrays, without what is multiplied by zero."""
  return [sum(part * float(c) for c, part in zip(row, parts) if c) for row in matrix]


def _along_width(x, row, padding):
  """Convolution with one row of a kernel, [3, in, out]."""
  return jax.lax.conv_general_dilated(
    x, row[None], (1, 1), ((0, 0), padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
