"""From whole images to class scores: the papers' evaluation protocols, over any model.

Scales and mirror images average probabilities, as official DeepLab does (model.py, predict_labels_multi_scale); sliding
windows average logits where they overlap, as PyTorch's codebases do.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax import sharding
from segjax.models import resize


def blank_padding(image: jax.Array, size: jax.Array, fill: Sequence[float]) -> jax.Array:
  """Fills the canvas around images with the mean pixel, which `preprocess` maps to 0.

  Args:
    image: [B, H, W, 3] raw RGB in [0, 255].
    size: [B, 2], (h, w) of each image in the top left corner.
    fill: the mean pixel.

  Returns:
    [B, H, W, 3] float32.
  """
  h, w = image.shape[1:3]
  rows = jnp.arange(h).reshape(1, h, 1, 1) < size[:, 0].reshape(-1, 1, 1, 1)
  cols = jnp.arange(w).reshape(1, 1, w, 1) < size[:, 1].reshape(-1, 1, 1, 1)
  return jnp.where(rows & cols, image.astype(jnp.float32), jnp.asarray(fill, jnp.float32).reshape(1, 1, 1, -1))


def mirrored_padding(image: jax.Array, size: jax.Array) -> jax.Array:
  """Fills the canvas around images with the images themselves, mirrored at their edge pixels; arguments as above."""

  def one(image, size):
    rows, cols = (resize.mirror_index(jnp.arange(n), length) for n, length in zip(image.shape, size))
    return image[rows][:, cols].astype(jnp.float32)

  return jax.vmap(one)(image, size)


def predict(
  model: nnx.Module,
  image: jax.Array,
  size: jax.Array,
  *,
  outside: str,
  sigmoid: bool,
  threshold: float,
  protocol: dict,
) -> tuple[jax.Array, jax.Array]:
  """Class ids [B, H, W] uint8 and `class_scores` of whole images on a canvas, as they are scored.

  Args:
    image, size: see `blank_padding`.
    outside: what the canvas shows beyond them: "void", the mean pixel, or "mirror".
    sigmoid: whether the model has one logit, that of the second of two classes,
    threshold: which is predicted where its probability lies above this.
    protocol: keywords of `class_scores`: scales, flip, window, window_stride.
  """
  if outside == "mirror":
    image = mirrored_padding(image, size)
  else:
    image = blank_padding(image, size, model.mean)
  image = sharding.split_height(image)
  scores = class_scores(model, model.preprocess(image), **protocol)
  chosen = foreground_probability(scores, **protocol) > threshold if sigmoid else scores.argmax(-1)
  return chosen.astype(jnp.uint8), scores


def class_scores(
  model: nnx.Module,
  image: jax.Array,
  *,
  scales: Sequence[float] = (1.0,),
  flip: bool = False,
  window: tuple[int, int] = (0, 0),
  window_stride: tuple[int, int] = (0, 0),
) -> jax.Array:
  """[B, H, W, K] of preprocessed images [B, H, W, 3]: logits of a single view, mean probabilities of several.

  Args:
    model: as of `models.build`.
    scales: relative to the image; the size rule is official DeepLab's, trunc((n - 1) * scale + 1).
    flip: whether each scale's mirror image is averaged in.
    window, window_stride: (H, W) of sliding windows at every scale, and the distance between them; (0, 0): the whole
      image at once. For a model with a margin they are tiles, see `overlap_tile`, and the distance is ignored.
  """
  views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
  options = dict(window=window, window_stride=window_stride)
  if len(views) == 1:
    return two_classes(view_logits(model, image, *views[0], **options))
  logits = (two_classes(view_logits(model, image, *view, **options)) for view in views)
  return sum(jax.nn.softmax(view) for view in logits) / len(views)


def two_classes(logits: jax.Array) -> jax.Array:
  """A one-logit head's [..., 1] as [..., 2], background and foreground: sigmoid(z) = softmax(0, z). Others as they are."""
  return logits if logits.shape[-1] > 1 else jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def foreground_probability(
  scores: jax.Array, *, scales: Sequence[float] = (1.0,), flip: bool = False, **_
) -> jax.Array:
  """[B, H, W], the probability of the second of two classes, of what `class_scores` gives under the same protocol."""
  several = len(scales) > 1 or flip
  return scores[..., 1] if several else jax.nn.sigmoid(scores[..., 1] - scores[..., 0])


def confidence(scores: jax.Array, *, scales: Sequence[float] = (1.0,), flip: bool = False, **_) -> jax.Array:
  """[B, H, W] float32, the probability of the most probable class, of what `class_scores` gives under the same protocol."""
  top, scores = scores.max(-1).astype(jnp.float32), scores.astype(jnp.float32)
  several = len(scales) > 1 or flip
  return top if several else 1 / jnp.exp(scores - top[..., None]).sum(-1)


def probabilities(scores: jax.Array, *, scales: Sequence[float] = (1.0,), flip: bool = False, **_) -> jax.Array:
  """[B, H, W, K] of what `class_scores` gives under the same protocol, float32."""
  several = len(scales) > 1 or flip
  return (scores if several else jax.nn.softmax(scores)).astype(jnp.float32)


def view_logits(
  model: nnx.Module, image: jax.Array, scale: float, mirrored: bool, *, window=(0, 0), window_stride=(0, 0)
) -> jax.Array:
  """Logits [B, H, W, K] of one view of the image, resized and mirrored back; arguments as of `class_scores`."""
  size = image.shape[1:3]
  view = resize.resize_bilinear(image, tuple(int((n - 1) * scale + 1) for n in size), model.align_corners)
  view = view[:, :, ::-1] if mirrored else view
  if any(window) and model.margin:
    logits = overlap_tile(model, view, window)
  else:
    logits = sliding_window(model, view, window, window_stride) if any(window) else model(view, upsample=False)
  logits = logits[:, :, ::-1] if mirrored else logits
  if scale < 1 and not any(window):
    # Officially, small logits first grow to the size that the image itself would have given.
    at_scale_1 = jax.eval_shape(lambda image: model(image, upsample=False), image)
    logits = resize.resize_bilinear(logits, at_scale_1.shape[1:3], model.align_corners)
  return resize.resize_bilinear(logits, size, model.align_corners)


def window_corners(size: int, window: int, stride: int) -> list[int]:
  """Where windows begin along one axis; the last one ends with the image."""
  count = -(-max(size - window, 0) // stride) + 1
  return [min(n * stride, max(size - window, 0)) for n in range(count)]


def sliding_window(model: nnx.Module, image: jax.Array, window: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
  """Logits [B, H, W, K] from overlapping windows, averaged where they overlap.

  One window after the other, in a loop that is compiled once: memory is that of one window. An image smaller than the
  window is one window of its own size.
  """
  size = image.shape[1:3]
  window = tuple(min(n, limit) for n, limit in zip(window, size))
  rows, cols = (window_corners(n, m, s) for n, m, s in zip(size, window, stride))
  corners = np.array([(row, col) for row in rows for col in cols], np.int32)
  count = np.zeros((1, *size, 1), np.float32)
  for row, col in corners:
    count[:, row : row + window[0], col : col + window[1]] += 1
  shape = jax.eval_shape(lambda image: model(image, upsample=True), image[:, : window[0], : window[1]])

  def add_window(n, total):
    row, col = jnp.asarray(corners)[n]
    part = jax.lax.dynamic_slice(image, (0, row, col, 0), (image.shape[0], *window, image.shape[3]))
    before = jax.lax.dynamic_slice(total, (0, row, col, 0), shape.shape)
    return jax.lax.dynamic_update_slice(total, before + model(part, upsample=True), (0, row, col, 0))

  total = jnp.zeros((image.shape[0], *size, shape.shape[-1]), shape.dtype)
  return jax.lax.fori_loop(0, len(corners), add_window, total) / count.astype(shape.dtype)


def overlap_tile(model, image: jax.Array, tile: tuple[int, int]) -> jax.Array:
  """Logits [B, H, W, K] of an unpadded U-Net from tiles, the same as those of the whole image at once.

  The overlap-tile strategy (arXiv 1505.04597, section 2, figure 2): each tile of logits is computed from its pixels and
  the `margin` around them, mirrored beyond the image, so tiles fit together without a seam. One after the other, in a
  loop that is compiled once: memory is that of one tile.

  Args:
    model: a `models.unet.UNet` with padding "valid".
    image: [B, H, W, 3], preprocessed.
    tile: least (H, W) of a tile's logits, pixels. Tiles begin at multiples of the model's stride, so that poolings
      combine the same pixels in each.
  """
  h, w = image.shape[1:3]
  field = tuple(model.unpadded_size(min(n, limit)) for n, limit in zip(tile, (h, w)))  # Of a tile's pixels.
  out = tuple(n - 2 * model.margin for n in field)
  steps = tuple(max(n // model.coarsest_stride, 1) * model.coarsest_stride for n in out)
  counts = tuple(-(-max(n - m, 0) // step) + 1 for n, m, step in zip((h, w), out, steps))
  covered = tuple((count - 1) * step + m for count, step, m in zip(counts, steps, out))
  image = resize.mirror(image, model.margin, tuple(n + 2 * model.margin for n in covered))
  shape = jax.eval_shape(lambda x: model(x, context=True), image[:, : field[0], : field[1]])

  def add_tile(n, logits):
    row, col = n // counts[1] * steps[0], n % counts[1] * steps[1]
    part = jax.lax.dynamic_slice(image, (0, row, col, 0), (image.shape[0], *field, image.shape[3]))
    return jax.lax.dynamic_update_slice(logits, model(part, context=True), (0, row, col, 0))

  logits = jnp.zeros((image.shape[0], *covered, shape.shape[-1]), shape.dtype)
  return jax.lax.fori_loop(0, counts[0] * counts[1], add_tile, logits)[:, :h, :w]
