"""Random changes of a crop's colours, sharpness and noise; labels stay as they are."""

import math

import jax
import jax.numpy as jnp

from segjax.augment.options import Augmentation


def jitter(key, image, inside, options: Augmentation):
  """Random brightness, contrast, saturation and hue, in this order, with torchvision's definitions; then HSV shifts, gamma,
  blur and noise.

  Args:
    image: [H, W, 3] float in [0, 255]; for blur alone also of other channels and ranges.
    inside: [H, W] bool, the pixels whose mean grey contrast refers to, and that blur mixes.

  Returns:
    The same; a strength of 0 leaves its property untouched.
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
  gamma_key, blur_key, noise_key = (jax.random.fold_in(key, n) for n in (5, 6, 7))
  if options.gamma:
    exponent = jax.random.uniform(gamma_key, (), jnp.float32, 1 - options.gamma, 1 + options.gamma)
    image = 255 * jnp.clip(image / 255, 0, 1) ** exponent
  if options.blur:
    image = blur(image, inside, jax.random.uniform(blur_key, (), jnp.float32, 0, options.blur), options.blur)
  if options.noise:
    strength_key, noise_key = jax.random.split(noise_key)
    deviation = jax.random.uniform(strength_key, (), jnp.float32, 0, 255 * options.noise)
    image = jnp.clip(image + deviation * jax.random.normal(noise_key, image.shape, jnp.float32), 0, 255)
  return image


def blur(image, inside, deviation, largest: float):
  """[H, W, C] convolved with a Gaussian, cut off at three times the largest deviation.

  Only pixels `inside` count: at the edge of what there is, the weights that remain are divided by their sum.

  Args:
    inside: [H, W] bool.
    deviation: float scalar in [0, largest], pixels.
  """
  reach = math.ceil(3 * largest)
  weights = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / jnp.maximum(deviation, 1e-3)) ** 2)
  inside = inside[..., None].astype(jnp.float32)
  total = jnp.concatenate([jnp.where(inside > 0, image, 0), inside], axis=-1)
  for axis in (0, 1):
    padded = jnp.pad(total, [(reach, reach) if n == axis else (0, 0) for n in range(3)])
    shifted = (jax.lax.slice_in_dim(padded, n, n + total.shape[axis], axis=axis) for n in range(2 * reach + 1))
    total = sum(weight * part for weight, part in zip(weights, shifted))
  return jnp.where(inside > 0, total[..., :-1] / jnp.where(inside > 0, total[..., -1:], 1), image)


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
