"""Training augmentation on the device, inside the jitted step: random scale, crop, flip and colour.

Hosts only decode; the random part is a pure function of (seed, step, position in the global batch), so any number of
devices or hosts, and either loader, sees the same crops. Scale, crop and flip are one separable resample: each output
row looks at one (fractional) input row, each output column at one input column.
"""

import jax
import jax.numpy as jnp


def crop_positions(key, length, crop: int, scale, flip) -> tuple[jax.Array, jax.Array]:
  """Where each pixel of a crop looks along one axis, after resizing that axis and cropping it at random.

  The axis is resized to trunc(length * scale) with align_corners, padded at the end where shorter than the crop, and
  cropped at a uniform offset (official DeepLab, core/preprocess_utils.py).

  Args:
    key: for the offset.
    length: int scalar, pixels of the image along this axis.
    crop: pixels of the crop.
    scale: float scalar.
    flip: bool scalar, reverses the crop.

  Returns:
    [crop] float32 input positions, and [crop] bool, False where the crop lies in the padding.
  """
  resized = jnp.maximum((length.astype(jnp.float32) * scale).astype(jnp.int32), 1)
  offset = jax.random.randint(key, (), 0, jnp.maximum(resized - crop, 0) + 1)
  index = jnp.arange(crop)
  index = jnp.where(flip, crop - 1 - index, index) + offset
  step = (length - 1).astype(jnp.float32) / jnp.maximum(resized - 1, 1)
  return index * step, index < resized


def scale_crop_flip(key, image, label, size, *, crop_size, scale, scale_step, flip):
  """One example at random scale, place and side.

  Args:
    image: [H, W, 3] uint8 canvas; label: [H, W] uint8 canvas; size: [2] int32, the image's own height and width.
    crop_size: (h, w) of the result.
    scale: (smallest, largest), relative to the image.
    scale_step: 0 for continuous, else the spacing of the values drawn, from the smallest on.
    flip: whether to mirror left-right with probability 1/2.

  Returns:
    image [h, w, 3] float32 in [0, 255] (bilinear), label [h, w] int32 (nearest), inside [h, w] bool: False in the
    padding, where image and label mean nothing.
  """
  scale_key, flip_key, row_key, col_key = jax.random.split(key, 4)
  if scale_step:
    count = int((scale[1] - scale[0]) / scale_step + 1e-6) + 1
    factor = scale[0] + scale_step * jax.random.randint(scale_key, (), 0, count)
  else:
    factor = jax.random.uniform(scale_key, (), jnp.float32, scale[0], scale[1])
  mirrored = jax.random.bernoulli(flip_key) if flip else jnp.asarray(False)
  rows, in_rows = crop_positions(row_key, size[0], crop_size[0], factor, jnp.asarray(False))
  cols, in_cols = crop_positions(col_key, size[1], crop_size[1], factor, mirrored)

  top, bottom, down, nearest_row = _neighbours(rows, size[0])
  left, right, across, nearest_col = _neighbours(cols, size[1])
  down, across = down[:, None, None], across[None, :, None]
  # Rows first: whole rows are contiguous, so this gather is a copy, and the column gather sees a smaller array.
  lines = image[top] * (1 - down) + image[bottom] * down  # [h, W, 3]
  image = lines[:, left] * (1 - across) + lines[:, right] * across  # [h, w, 3]
  return image, label[nearest_row][:, nearest_col].astype(jnp.int32), in_rows[:, None] & in_cols[None, :]


def _neighbours(position, length):
  """Per position: the two pixels around it, the weight of the second, and the nearest pixel (halves upwards)."""
  low = jnp.clip(jnp.floor(position).astype(jnp.int32), 0, length - 1)
  nearest = jnp.clip(jnp.floor(position + 0.5).astype(jnp.int32), 0, length - 1)
  return low, jnp.minimum(low + 1, length - 1), position - low, nearest


def jitter_color(key, image, inside, *, brightness, contrast, saturation, hue):
  """Random brightness, contrast, saturation and hue, in this order, with torchvision's definitions.

  Args:
    image: [H, W, 3] float in [0, 255].
    inside: [H, W] bool, the pixels whose mean grey contrast refers to.
    brightness, contrast, saturation: strength s; the factor is uniform in [1 - s, 1 + s].
    hue: strength s; the shift is uniform in [-s, s] of the colour circle.

  Returns:
    [H, W, 3] in [0, 255]; a strength of 0 leaves its property untouched.
  """
  keys = jax.random.split(key, 4)

  def blend(image, other, key, strength):
    amount = jax.random.uniform(key, (), jnp.float32, 1 - strength, 1 + strength)
    return jnp.clip(other + (image - other) * amount, 0, 255)

  if brightness:
    image = blend(image, 0.0, keys[0], brightness)
  if contrast:
    image = blend(image, jnp.mean(_grey(image)[..., 0], where=inside), keys[1], contrast)
  if saturation:
    image = blend(image, _grey(image), keys[2], saturation)
  if hue:
    image = shift_hue(image, jax.random.uniform(keys[3], (), jnp.float32, -hue, hue))
  return image


def _grey(image):
  """ITU-R BT.601 luma, [H, W, 1]."""
  return 0.299 * image[..., 0:1] + 0.587 * image[..., 1:2] + 0.114 * image[..., 2:3]


def shift_hue(image: jax.Array, shift) -> jax.Array:
  """Turns the hue of [H, W, 3] RGB by `shift` of the colour circle, keeping HSV saturation and value."""
  value = image.max(-1)
  chroma = value - image.min(-1)
  safe = jnp.where(chroma > 0, chroma, 1)
  r, g, b = image[..., 0], image[..., 1], image[..., 2]
  # By comparisons: `value == r` may fail for the largest channel, as XLA computes a pixel twice with other roundings.
  green_or_blue = jnp.where(g >= b, (b - r) / safe + 2, (r - g) / safe + 4)
  sector = jnp.where((r >= g) & (r >= b), (g - b) / safe % 6, green_or_blue)
  # HSV to RGB: channel n = value - chroma * clip(min(k, 4 - k), 0, 1), k = (n + sector) mod 6, n = 5, 3, 1.
  k = (jnp.array([5.0, 3.0, 1.0]).reshape(1, 1, 3) + sector[..., None] + 6 * shift) % 6
  return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def augment_batch(key, image, label, size, *, crop_size, fill, ignore_label, scale, scale_step, flip, **color):
  """A batch of canvases to a batch of crops; example i draws from fold_in(key, i).

  Args:
    key: of this step.
    image: [B, H, W, 3] uint8, label: [B, H, W] uint8, size: [B, 2] int32.
    fill: (r, g, b) of the padding. ignore_label: the label of the padding.
    crop_size, scale, scale_step, flip: as in `scale_crop_flip`.
    color: as in `jitter_color`.

  Returns:
    image [B, h, w, 3] float32 in [0, 255], label [B, h, w] int32.
  """

  def one(index, image, label, size):
    place_key, color_key = jax.random.split(jax.random.fold_in(key, index))
    image, label, inside = scale_crop_flip(
      place_key, image, label, size, crop_size=crop_size, scale=scale, scale_step=scale_step, flip=flip
    )
    image = jitter_color(color_key, image, inside, **color)
    fill_pixel = jnp.asarray(fill, jnp.float32).reshape(1, 1, 3)
    return jnp.where(inside[..., None], image, fill_pixel), jnp.where(inside, label, ignore_label)

  return jax.vmap(one)(jnp.arange(image.shape[0]), image, label, size)
