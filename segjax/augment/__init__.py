"""Training augmentation on the device, inside the jitted step: random scale, crop, flip, warp, colour and ClassMix.

Hosts only decode; the random part is a pure function of (seed, step, position in the global batch), so any number of
devices or hosts, and either loader, sees the same crops. Scale, crop and flip are one separable resample: each output
row looks at one (fractional) input row, each output column at one input column. Rotation, shear and elastic deformation
are not, and gather pixel by pixel.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.augment import class_mix, color, foreground
from segjax.augment.options import Augmentation
from segjax.models import resize

_LARGEST_NORMAL = 6  # Deviations; jax.random.normal gives at most 5.5 in float32.


def crop_window(crop_size: tuple[int, int], margin: int, options: Augmentation):
  """How much of an image `random_crop` can look at, whatever it draws: what `canvas.cut_window` cuts from large images.

  An image of L pixels at scale s has about L s, of which a crop shows c and looks at e more on each side (margin, warp, and
  the neighbours that interpolation takes). So it looks at (c + 2 e) / s pixels of the image, most at the smallest s.

  Args:
    crop_size, margin: as in `random_crop`.

  Returns:
    size: (h, w) pixels. around: (h, w), those of them that lie on each side of the crop.
  """
  half = [(n + 2 * margin - 1) / 2 for n in crop_size]
  row, col = (n / (1 - options.zoom) for n in half)
  col += math.tan(math.radians(options.shear)) * row
  turned = math.sin(math.radians(min(options.rotation, 90)))
  sizes, arounds = [], []
  for n, crop in enumerate(crop_size):
    reach = (row + turned * col, col + turned * row)[n] + options.shift * (crop + 2 * margin) - half[n]
    reach += options.elastic * _LARGEST_NORMAL * np.abs(bicubic_matrix(crop + 2 * margin)).sum(1).max() ** 2
    step = (1 + 2 / crop) / options.scale[0]  # Pixels of the image per pixel of the crop: L - 1 over trunc(L s) - 1.
    around = math.ceil((1 + margin + reach) * step) + 2
    sizes.append(math.ceil(crop * step) + 2 * around)
    arounds.append(around)
  return tuple(sizes), tuple(arounds)


def crop_axis(key, length, crop: int, scale, share=None, pixel=None):
  """Resizes one axis, crops it at random, and says where a crop's pixels look.

  The axis is resized to trunc(length * scale) with align_corners, and cropped at a uniform offset, or, where shorter
  than the crop, begins with it (official DeepLab, core/preprocess_utils.py).

  Args:
    key: for the offset.
    length: int scalar, pixels of the image along this axis.
    crop: pixels of the crop.
    scale: float scalar.
    share: float scalar in [0, 1), the offset as a share of all there are, instead of `key`; below 0: none. Or None.
    pixel: int scalar, a pixel of the image that the crop shall hold; below 0: none. Or None.

  Returns:
    look(index) -> input positions, and whether they lie inside the image, for whole or fractional crop pixels `index`.
  """
  resized = jnp.maximum((length.astype(jnp.float32) * scale).astype(jnp.int32), 1)
  count = jnp.maximum(resized - crop, 0) + 1
  offset = jax.random.randint(key, (), 0, count)
  if share is not None:
    offset = jnp.where(share < 0, offset, jnp.minimum((share * count).astype(jnp.int32), count - 1))
  step = (length - 1).astype(jnp.float32) / jnp.maximum(resized - 1, 1)
  if pixel is not None:
    place = jnp.round(pixel / jnp.maximum(step, 1e-6)).astype(jnp.int32)  # In the resized image.
    first, last = jnp.clip(place - crop + 1, 0, count - 1), jnp.clip(place, 0, count - 1)
    offset = jnp.where(pixel < 0, offset, jax.random.randint(key, (), first, last + 1))

  def look(index):
    index = index + offset
    return index * step, (index > -0.5) & (index <= resized - 0.5)

  return look


def warp_field(key, size: tuple[int, int], options: Augmentation):
  """Where each pixel of a crop looks within the crop's frame: a random affine map about its centre, and a random bulge.

  Args:
    size: (h, w) of the crop.

  Returns:
    rows, cols [h, w] float32, pixels of the crop before the warp.
  """
  keys = jax.random.split(key, 5)

  def draw(key, strength, shape=()):
    return jax.random.uniform(key, shape, jnp.float32, -strength, strength)

  angle, slant = (draw(k, jnp.deg2rad(s)) for k, s in ((keys[0], options.rotation), (keys[1], options.shear)))
  row, col = (jnp.arange(n, dtype=jnp.float32) - (n - 1) / 2 for n in size)
  factor = 1 + draw(keys[2], options.zoom, (2,))
  row, col = row[:, None] / factor[0], col[None, :] / factor[1]
  col = col + jnp.tan(slant) * row
  row = jnp.broadcast_to(row, size)
  turned = jnp.cos(angle) * row - jnp.sin(angle) * col, jnp.sin(angle) * row + jnp.cos(angle) * col
  moved = draw(keys[3], options.shift, (2,)) * jnp.array(size, jnp.float32)
  bulge = jnp.zeros((*size, 2))
  if options.elastic:
    grid = options.elastic * jax.random.normal(keys[4], (3, 3, 2))
    bulge = jnp.einsum("hi,ijc,wj->hwc", bicubic_matrix(size[0]), grid, bicubic_matrix(size[1]))
  return tuple(turned[n] + (size[n] - 1) / 2 + moved[n] + bulge[..., n] for n in (0, 1))


def bicubic_matrix(size: int) -> np.ndarray:
  """[size, 3] float32: Catmull-Rom interpolation of three knots at the first, middle and last pixel.

  Beyond the ends the knots go on linearly, so straight lines stay straight.
  """
  position = np.arange(size) * (2 / max(size - 1, 1))
  segment = np.minimum(position.astype(int), 1)
  t = (position - segment)[:, None]
  cubic = 0.5 * np.concatenate(
    [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3], axis=1
  )  # Weights of the knots segment - 1 ... segment + 2.
  knots = np.array([[2, -1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, -1, 2]])
  return np.stack([cubic[i] @ knots[segment[i] : segment[i] + 4] for i in range(size)]).astype(np.float32)


def random_crop(key, example: dict, *, crop_size: tuple[int, int], margin: int, options: Augmentation, classes=None):
  """One example at random scale, position and side, turned and bent at random.

  Args:
    example: canvases `image` [H, W, C] (RGB uint8, but for `images.Pixels`) and `label` [H, W] uint8, and `size` [2] int32, the image's own height and
      width. It may have `border` [H, W], pixel weights that go with the label; and, of `canvas.cut_window`, `origin` [2]
      int32, the pixel of the image that is the canvas' first, with `share` [2] float32, see `crop_axis`.
    crop_size: (h, w) of the label.
    margin: pixels of image around the label's crop.
    classes: see `augment_batch`.

  Returns:
    image [h + 2 margin, w + 2 margin, 3] float32 in [0, 255] (bilinear); label [h, w] int32 and border [h, w] float32 or
    None (nearest); inside: bool of the image's size, False where image and label mean nothing.
  """
  scale_key, flip_key, row_key, col_key, *warp_key = jax.random.split(key, 5 if options.warps else 4)
  scale = _draw_scale(scale_key, options)
  mirrored = jax.random.bernoulli(flip_key) if options.flip else jnp.asarray(False)
  size = example["size"]
  origin, share = (example["origin"], example["share"]) if "origin" in example else ((0, 0), (None, None))
  pixel = (None, None)
  if options.foreground:
    pixel = foreground.choose_pixel(jax.random.fold_in(key, 8), example["label"], classes, options.foreground)
  look_row = crop_axis(row_key, size[0], crop_size[0], scale, share[0], pixel[0])
  look_col = crop_axis(col_key, size[1], crop_size[1], scale, share[1], pixel[1])

  whole = tuple(n + 2 * margin for n in crop_size)
  frame = warp_field(warp_key[0], whole, options) if options.warps else (jnp.arange(n) for n in whole)
  row, col = (x - margin for x in frame)
  (rows, in_rows), (cols, in_cols) = look_row(row), look_col(jnp.where(mirrored, crop_size[1] - 1 - col, col))
  folds = options.outside == "mirror" or margin > 0
  row, col = _neighbours(rows, size[0], origin[0], folds), _neighbours(cols, size[1], origin[1], folds)
  inner = np.s_[margin : margin + crop_size[0]], np.s_[margin : margin + crop_size[1]]

  labels = [example[name] for name in ("label", "border") if name in example]
  if options.warps:
    image = _bilinear_pixels(example["image"], row, col)
    label, *border = (x[row.nearest[inner], col.nearest[inner]] for x in labels)
    inside = in_rows & in_cols
  else:
    image = _bilinear_lines(example["image"], row, col)
    label, *border = (x[row.nearest[inner[0]]][:, col.nearest[inner[1]]] for x in labels)
    inside = in_rows[:, None] & in_cols[None, :]
  if options.outside == "mirror":
    inside = jnp.ones_like(inside)
  crop = image, label.astype(jnp.int32), border[0].astype(jnp.float32) if border else None, inside
  return _turn(jax.random.fold_in(key, 9), crop, options)


def _turn(key, arrays, options: Augmentation):
  """The same of arrays [n, n, ...] (or [h, w, ...], without quarter turns), mirrored top-bottom and turned at random."""
  mirror_key, turn_key = jax.random.split(key)
  if options.flip_vertical:
    mirrored = jax.random.bernoulli(mirror_key)
    arrays = jax.tree.map(lambda x: jnp.where(mirrored, x[::-1], x), arrays)
  if options.quarter_turns:
    count = jax.random.randint(turn_key, (), 0, 4)  # Counter-clockwise.
    turned = [jax.tree.map(lambda x, n=n: jnp.rot90(x, n), arrays) for n in range(4)]
    arrays = jax.tree.map(lambda *x: jax.lax.select_n(count, *x), *turned)
  return arrays


def _draw_scale(key, options: Augmentation):
  smallest, largest = options.scale
  if not options.scale_step:
    return jax.random.uniform(key, (), jnp.float32, smallest, largest)
  count = int((largest - smallest) / options.scale_step + 1e-6) + 1
  return smallest + options.scale_step * jax.random.randint(key, (), 0, count)


class _Neighbours(NamedTuple):
  """The pixels of a canvas that positions along one axis look at."""

  low: jax.Array
  high: jax.Array
  weight: jax.Array  # Of `high`; that of `low` is 1 - weight.
  nearest: jax.Array  # Halves upwards.


def _neighbours(position, length, origin, folds: bool) -> _Neighbours:
  """Those of an image of `length` pixels, of which the canvas' first is `origin`.

  Positions outside are mirrored at the edge pixels if it `folds`, else their values mean nothing.
  """
  if folds:
    position = resize.mirror_index(position, length)
  low = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, length - 1)
  nearest = jnp.clip(jnp.floor(position + 0.5).astype(jnp.int32), 0, length - 1)
  return _Neighbours(low - origin, jnp.minimum(low + 1, length - 1) - origin, position - low, nearest - origin)


def _bilinear_lines(image, row: _Neighbours, col: _Neighbours):
  """[h, w, 3] where whole rows and columns look alike, [h] and [w].

  Rows first: whole rows are contiguous, so this gather is a copy, and the column gather sees a smaller array.
  """
  down, across = row.weight[:, None, None], col.weight[None, :, None]
  lines = image[row.low] * (1 - down) + image[row.high] * down  # [h, W, 3]
  return lines[:, col.low] * (1 - across) + lines[:, col.high] * across


def _bilinear_pixels(image, row: _Neighbours, col: _Neighbours):
  """[h, w, 3] where each pixel looks elsewhere, [h, w] each."""
  down, across = row.weight[..., None], col.weight[..., None]
  upper = image[row.low, col.low] * (1 - across) + image[row.low, col.high] * across
  lower = image[row.high, col.low] * (1 - across) + image[row.high, col.high] * across
  return upper * (1 - down) + lower * down


def augment_batch(
  key, batch: dict, *, options: Augmentation, crop_size, margin, fill, ignore_label, num_classes, classes=None
):
  """A batch of canvases to a batch of crops; example i draws from fold_in(key, i).

  Args:
    key: of this step.
    batch: arrays [B, ...], each example as of `random_crop`.
    crop_size, margin: as in `random_crop`.
    fill: of each channel, the padding.
    ignore_label: the label of the padding.
    num_classes: labels below it are classes.
    classes: [K] float, for options.foreground: how probable each class is to be in such a crop. None without it.

  Returns:
    image [B, h + 2 margin, w + 2 margin, 3] float32 in [0, 255], label [B, h, w] int32, border [B, h, w] float32 or
    None where the batch has none.
  """
  h, w = crop_size

  def one(index, example):
    crop_key, color_key = jax.random.split(jax.random.fold_in(key, index))
    image, label, border, inside = random_crop(
      crop_key, example, crop_size=crop_size, margin=margin, options=options, classes=classes
    )
    shown = jnp.ones_like(inside) if margin else inside  # With a margin, what is outside is mirrored.
    image = color.jitter(color_key, image, shown, options)
    image = jnp.where(shown[..., None], image, jnp.asarray(fill, jnp.float32).reshape(1, 1, -1))
    inside = inside[margin : margin + h, margin : margin + w]
    return image, jnp.where(inside, label, ignore_label), None if border is None else jnp.where(inside, border, 0)

  crops = jax.vmap(one)(jnp.arange(batch["image"].shape[0]), batch)
  return class_mix.mix(key, crops, options.class_mix, num_classes) if options.class_mix else crops
