"""Training augmentation on the device, inside the jitted step: random scale, crop, flip, warp and colour.

Hosts only decode; the random part is a pure function of (seed, step, position in the global batch), so any number of
devices or hosts, and either loader, sees the same crops. Scale, crop and flip are one separable resample: each output
row looks at one (fractional) input row, each output column at one input column. Rotation, shear and elastic deformation
are not, and gather pixel by pixel.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.models import resize

_LARGEST_NORMAL = 6  # Deviations; jax.random.normal gives at most 5.5 in float32.


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """What is drawn at random for each training crop, the fields of `config.augment`; 0 and False are off.

  Scale, crop and flip:
    scale: (smallest, largest) of the random resize, relative to the stored image.
    scale_step: 0: continuous uniform, else the spacing of the values drawn, from the smallest on (official DeepLab: 0.25).
    flip: mirrors left-right with probability 1/2.
    outside: what crops show beyond the image. "mirror": image and label go on, mirrored. "void": the mean pixel, without a
      label; but the image is mirrored for a model with a margin, as in its predictions.
  Warp, see `warp_field`:
    rotation: strength s, degrees; uniform in [-s, s] about the crop's centre. 0: off.
    shift: strength s, share of the crop; uniform in [-s, s] for height and width. 0: off.
    shear: strength s, degrees; uniform in [-s, s]; slants the columns. 0: off.
    zoom: strength s; factors of height and width are uniform in [1 - s, 1 + s], each its own, beside `scale`. 0: off.
    elastic: deviation in pixels of the normal displacements of a 3x3 grid over the crop, interpolated bicubically to
      all pixels (U-Net, arXiv 1505.04597, section 3.1: 10). 0: off.
  Colour, see `jitter_color`:
    brightness, contrast, saturation: strength s; the factor is uniform in [1 - s, 1 + s]. 0: off.
    hue: strength s; the shift is uniform in [-s, s] of the colour circle. 0: off.
    hsv: strengths s of what is added to hue, saturation and value, uniform in [-s, s] of their range. 0: off.
  """

  scale: tuple[float, float] = (0.5, 2.0)
  scale_step: float = 0.0
  flip: bool = True
  outside: str = "void"
  rotation: float = 0.0
  shift: float = 0.0
  shear: float = 0.0
  zoom: float = 0.0
  elastic: float = 0.0
  brightness: float = 0.0
  contrast: float = 0.0
  saturation: float = 0.0
  hue: float = 0.0
  hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)

  @property
  def warps(self) -> bool:
    """Whether crops are warped at all; without it resampling is separable."""
    return any((self.rotation, self.shift, self.shear, self.zoom, self.elastic))


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


def crop_axis(key, length, crop: int, scale, share=None):
  """Resizes one axis, crops it at random, and says where a crop's pixels look.

  The axis is resized to trunc(length * scale) with align_corners, and cropped at a uniform offset, or, where shorter
  than the crop, begins with it (official DeepLab, core/preprocess_utils.py).

  Args:
    key: for the offset.
    length: int scalar, pixels of the image along this axis.
    crop: pixels of the crop.
    scale: float scalar.
    share: float scalar in [0, 1), the offset as a share of all there are, instead of `key`; below 0: none. Or None.

  Returns:
    look(index) -> input positions, and whether they lie inside the image, for whole or fractional crop pixels `index`.
  """
  resized = jnp.maximum((length.astype(jnp.float32) * scale).astype(jnp.int32), 1)
  count = jnp.maximum(resized - crop, 0) + 1
  offset = jax.random.randint(key, (), 0, count)
  if share is not None:
    offset = jnp.where(share < 0, offset, jnp.minimum((share * count).astype(jnp.int32), count - 1))
  step = (length - 1).astype(jnp.float32) / jnp.maximum(resized - 1, 1)

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


def random_crop(key, example: dict, *, crop_size: tuple[int, int], margin: int, options: Augmentation):
  """One example at random scale, position and side, turned and bent at random.

  Args:
    example: canvases `image` [H, W, C] (RGB uint8, but for `images.Pixels`) and `label` [H, W] uint8, and `size` [2] int32, the image's own height and
      width. It may have `border` [H, W], pixel weights that go with the label; and, of `canvas.cut_window`, `origin` [2]
      int32, the pixel of the image that is the canvas' first, with `share` [2] float32, see `crop_axis`.
    crop_size: (h, w) of the label.
    margin: pixels of image around the label's crop.

  Returns:
    image [h + 2 margin, w + 2 margin, 3] float32 in [0, 255] (bilinear); label [h, w] int32 and border [h, w] float32 or
    None (nearest); inside: bool of the image's size, False where image and label mean nothing.
  """
  scale_key, flip_key, row_key, col_key, *warp_key = jax.random.split(key, 5 if options.warps else 4)
  scale = _draw_scale(scale_key, options)
  mirrored = jax.random.bernoulli(flip_key) if options.flip else jnp.asarray(False)
  size = example["size"]
  origin, share = (example["origin"], example["share"]) if "origin" in example else ((0, 0), (None, None))
  look_row = crop_axis(row_key, size[0], crop_size[0], scale, share[0])
  look_col = crop_axis(col_key, size[1], crop_size[1], scale, share[1])

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
  return image, label.astype(jnp.int32), border[0].astype(jnp.float32) if border else None, inside


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


def jitter_color(key, image, inside, options: Augmentation):
  """Random brightness, contrast, saturation and hue, in this order, with torchvision's definitions, then HSV shifts.

  Args:
    image: [H, W, 3] float in [0, 255].
    inside: [H, W] bool, the pixels whose mean grey contrast refers to.

  Returns:
    [H, W, 3] in [0, 255]; a strength of 0 leaves its property untouched.
  """
  keys = jax.random.split(key, 4)

  def blend(image, other, key, strength):
    amount = jax.random.uniform(key, (), jnp.float32, 1 - strength, 1 + strength)
    return jnp.clip(other + (image - other) * amount, 0, 255)

  if options.brightness:
    image = blend(image, 0.0, keys[0], options.brightness)
  if options.contrast:
    image = blend(image, jnp.mean(_grey(image)[..., 0], where=inside), keys[1], options.contrast)
  if options.saturation:
    image = blend(image, _grey(image), keys[2], options.saturation)
  if options.hue:
    image = shift_hue(image, jax.random.uniform(keys[3], (), jnp.float32, -options.hue, options.hue))
  if any(options.hsv):
    shifts = jax.random.uniform(jax.random.fold_in(key, 4), (3,), jnp.float32, -1, 1)
    image = shift_hsv(image, *shifts * jnp.asarray(options.hsv, jnp.float32))
  return image


def _grey(image):
  """ITU-R BT.601 luma, [H, W, 1]."""
  return 0.299 * image[..., 0:1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:3]


def shift_hue(image: jax.Array, shift) -> jax.Array:
  """Turns the hue of [H, W, 3] RGB by `shift` of the colour circle, keeping HSV saturation and value."""
  sector, chroma, value = _hue_chroma_value(image)
  return _from_hue_chroma_value(sector + 6 * shift, chroma, value)


def shift_hsv(image: jax.Array, hue, saturation, value) -> jax.Array:
  """Adds to hue (turning), saturation and value (clipping) of [H, W, 3] RGB in [0, 255]; shares of their range."""
  sector, chroma, v = _hue_chroma_value(image)
  moved = jnp.clip(v + 255 * value, 0, 255)
  s = jnp.clip(chroma / jnp.where(v > 0, v, 1) + jnp.where(chroma > 0, saturation, 0), 0, 1)  # Grey has no hue to show.
  return _from_hue_chroma_value(sector + 6 * hue, s * moved, moved)


def _hue_chroma_value(image):
  """Hue in [-1, 5], max - min, and max of [H, W, 3] RGB."""
  value = image.max(-1)
  chroma = value - image.min(-1)
  safe = jnp.where(chroma > 0, chroma, 1)
  r, g, b = image[..., 0], image[..., 1], image[..., 2]
  # By comparisons: `value == r` may fail for the largest channel, as XLA computes a pixel twice with other roundings.
  green_or_blue = jnp.where(g >= b, (b - r) / safe + 2, (r - g) / safe + 4)
  return jnp.where((r >= g) & (r >= b), (g - b) / safe, green_or_blue), chroma, value


def _from_hue_chroma_value(sector, chroma, value):
  """The inverse: channel n = value - chroma * clip(min(k, 4 - k), 0, 1), k = (n + sector) mod 6, n = 5, 3, 1."""
  k = jnp.array([5.0, 3.0, 1.0]).reshape(1, 1, 3) + sector[..., None]
  k -= 6 * jnp.floor(k / 6)  # Not % 6: XLA:CPU calls fmod for one pixel after the other.
  return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def augment_batch(key, batch: dict, *, options: Augmentation, crop_size, margin, fill, ignore_label):
  """A batch of canvases to a batch of crops; example i draws from fold_in(key, i).

  Args:
    key: of this step.
    batch: arrays [B, ...], each example as of `random_crop`.
    crop_size, margin: as in `random_crop`.
    fill: of each channel, the padding.
    ignore_label: the label of the padding.

  Returns:
    image [B, h + 2 margin, w + 2 margin, 3] float32 in [0, 255], label [B, h, w] int32, border [B, h, w] float32 or
    None where the batch has none.
  """
  h, w = crop_size

  def one(index, example):
    crop_key, color_key = jax.random.split(jax.random.fold_in(key, index))
    image, label, border, inside = random_crop(crop_key, example, crop_size=crop_size, margin=margin, options=options)
    shown = jnp.ones_like(inside) if margin else inside  # With a margin, what is outside is mirrored.
    image = jitter_color(color_key, image, shown, options)
    image = jnp.where(shown[..., None], image, jnp.asarray(fill, jnp.float32).reshape(1, 1, -1))
    inside = inside[margin : margin + h, margin : margin + w]
    return image, jnp.where(inside, label, ignore_label), None if border is None else jnp.where(inside, border, 0)

  return jax.vmap(one)(jnp.arange(batch["image"].shape[0]), batch)
