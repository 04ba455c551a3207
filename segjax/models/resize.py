"""Bilinear resizing with align_corners=True, the convention of segjax (official DeepLab, core/utils.py); mirroring.

Output pixel i looks at input position i * (in - 1) / (out - 1): corners map to corners, so a 4k+1 grid resizes
exactly onto its 2k+1 grid. jax.image.resize has half-pixel centres and would move every logit. Those, position
(i + 1/2) * in / out - 1/2, are here by name for weights that were trained so (PyTorch's align_corners=False).
"""

import jax
import jax.numpy as jnp
import numpy as np

from segjax.kernels import resample


def interpolation_matrix(size_in: int, size_out: int, align_corners: bool = True) -> np.ndarray:
  """[size_out, size_in] float32; each row holds the one or two weights of an output pixel. Identity for equal sizes."""
  pixels = np.arange(size_out, dtype=np.float32)
  if align_corners:
    step = np.float32((size_in - 1) / (size_out - 1)) if size_out > 1 else np.float32(0)
    position = pixels * step
  else:
    position = (pixels + np.float32(0.5)) * np.float32(size_in / size_out) - np.float32(0.5)
  position = np.clip(position, np.float32(0), np.float32(size_in - 1))
  low = np.floor(position).astype(int)
  high = np.minimum(low + 1, size_in - 1)
  weight = position - low
  matrix = np.zeros((size_out, size_in), np.float32)
  np.add.at(matrix, (np.arange(size_out), low), 1 - weight)
  np.add.at(matrix, (np.arange(size_out), high), weight)
  return matrix


@jax.named_scope("resize")  # For profiles, and flops.py leaves it out.
def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool = True) -> jax.Array:
  """Resizes [B, h, w, C] to [B, H, W, C], `size` = (H, W), in x's dtype."""
  axes = ((axis, x.shape[axis], size_out) for axis, size_out in ((1, size[0]), (2, size[1])))
  matrices = ((axis, interpolation_matrix(n, size_out, align_corners)) for axis, n, size_out in axes if n != size_out)
  return resample.resample(x, tuple(matrices))


def bilinear_filter(stride: int) -> np.ndarray:
  """[2 stride] float64: how a transposed convolution interpolates linearly (Shelhamer et al. 2017, section 3.3)."""
  return 1 - np.abs(np.arange(2 * stride) - (stride - 0.5)) / stride


def upsample_bilinear(x: jax.Array, stride: int) -> jax.Array:
  """A `layers.ConvTranspose` that keeps its initial kernel: [B, H, W, C] -> [B, (H + 1) stride, (W + 1) stride, C].

  Pixels have their values at their centres, and there are zeros around x.
  """
  line, matrices = bilinear_filter(stride), []
  for axis in (1, 2):
    n = x.shape[axis]
    matrix = np.zeros((n + 1, stride, n))
    matrix[np.arange(n), :, np.arange(n)] = line[:stride]
    matrix[np.arange(1, n + 1), :, np.arange(n)] = line[stride:]
    matrices.append((axis, matrix.reshape(-1, n)))
  return resample.product(x, tuple(matrices))


def resize_nearest(label: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes [B, h, w] of any type to [B, H, W], `size` = (H, W); the same convention, halves rounded up.

  For labels at the logits' size (official upsample_logits=False); interpolating ids would invent classes.
  """
  for axis, size_out in ((1, size[0]), (2, size[1])):
    size_in = label.shape[axis]
    step = np.float32((size_in - 1) / (size_out - 1)) if size_out > 1 else np.float32(size_in / size_out)
    index = np.floor(np.arange(size_out, dtype=np.float32) * step + np.float32(0.5)).astype(int)
    label = jnp.take(label, np.minimum(index, size_in - 1), axis=axis)
  return label


def mirror_index(index, length):
  """Folds positions beyond [0, length - 1] back at the first and the last pixel: -1 -> 1, length -> length - 2.

  Args:
    index: whole or fractional positions, of NumPy or JAX.
    length: pixels along the axis, from 1 on; may be traced.
  """
  xp = np if isinstance(index, np.ndarray) and isinstance(length, int) else jnp
  last = length - 1
  folded = abs(index) % xp.maximum(2 * last, 1)
  return xp.clip(last - abs(folded - last), 0, last)


def mirror(image: jax.Array, before: int, size: tuple[int, int]) -> jax.Array:
  """[B, H, W, C] -> [B, *size, C]: the image from pixel (before, before) on, mirrored at its edge pixels around it."""
  for axis, length in ((1, size[0]), (2, size[1])):
    image = jnp.take(image, mirror_index(np.arange(length) - before, image.shape[axis]), axis=axis)
  return image
