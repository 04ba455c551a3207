"""Losses: pure functions of logits and labels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def make_loss(
  *,
  ignore_label: int,
  class_weights: np.ndarray | None = None,
  hard_fraction: float = 1.0,
  hard_fraction_steps: int = 0,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """loss(logits, label, step) -> scalar; arguments as of `softmax_cross_entropy` and `hard_fraction_at`."""

  def loss(logits, label, step):
    return softmax_cross_entropy(
      logits, label, ignore_label=ignore_label, class_weights=class_weights,
      hard_fraction=hard_fraction_at(step, hard_fraction, hard_fraction_steps),
    )  # fmt: skip

  return loss


def softmax_cross_entropy(
  logits: jax.Array,
  label: jax.Array,
  *,
  ignore_label: int,
  class_weights: jax.Array | np.ndarray | None = None,
  hard_fraction: float | jax.Array = 1.0,
) -> jax.Array:
  """Mean cross-entropy over the valid pixels of the whole batch, or over its hardest pixels.

  The sum is divided by the number of valid pixels of all devices at once; a mean of per-device means would weigh
  pixels by how much void their device happened to get. Weights scale the numerator only, as in official DeepLab
  (utils/train_utils.py); PyTorch divides by the sum of weights instead.

  Args:
    logits: [B, H, W, K] float32 (or float64).
    label: [B, H, W] int, in [0, K) or `ignore_label`, which adds exactly 0 to loss and gradient.
    class_weights: [K] >= 0.
    hard_fraction: below 1, only so large a share of all pixels (void ones count) counts, those of the largest weighted
      loss; their sum is divided by how many of them are not 0. May be traced, see `hard_fraction_at`.

  Returns:
    A float scalar; 0 where every pixel is void.
  """
  valid = label != ignore_label
  one_hot = jax.nn.one_hot(label, logits.shape[-1], dtype=bool)  # All False where void.
  picked = jnp.where(one_hot, logits, 0).sum(-1)
  loss = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) - picked, 0)
  if class_weights is not None:
    loss = loss * jnp.where(one_hot, jnp.asarray(class_weights, loss.dtype).reshape(1, 1, 1, -1), 0).sum(-1)
  if isinstance(hard_fraction, (int, float)) and hard_fraction >= 1:
    return loss.sum() / jnp.maximum(valid.sum(), 1)
  hardest = jnp.sort(loss.reshape(-1), descending=True)
  count = jnp.floor(jnp.float32(hard_fraction) * jnp.float32(hardest.size)).astype(jnp.int32)
  hardest = jnp.where(jnp.arange(hardest.size) < count, hardest, 0)
  return hardest.sum() / jnp.maximum((hardest != 0).sum(), 1)


def hard_fraction_at(step: jax.Array | int, fraction: float, steps: int) -> jax.Array | float:
  """The share of pixels in the loss at a step: linearly from 1 to `fraction` over `steps`, 0 for at once.

  Easing in lets all pixels teach at first, when the hardest are hard by chance (official DeepLab,
  hard_example_mining_step).
  """
  if steps == 0 or fraction == 1:
    return fraction
  progress = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / steps)
  return progress * fraction + (1 - progress)


def class_weights(rule: str, pixels: np.ndarray, images_with_class: np.ndarray) -> np.ndarray:
  """Weights [K] float32 from label statistics of the training split.

  Args:
    rule: "median_frequency": median(f) / f, f = a class's share of the pixels of the images that contain it (Eigen &
      Fergus 2015, section 4.3). "inverse_log": 1 / ln(1.02 + share of all pixels) (ENet, Paszke et al. 2016, section 5.2).
    pixels: [K] valid pixels per class.
    images_with_class: [K] valid pixels of the images that contain the class.

  Raises:
    ValueError: a class without any pixel under "median_frequency", where its weight would be infinite.
  """
  pixels, images_with_class = np.asarray(pixels, np.float64), np.asarray(images_with_class, np.float64)
  if rule == "inverse_log":
    return (1 / np.log(1.02 + pixels / pixels.sum())).astype(np.float32)
  if (pixels == 0).any():
    raise ValueError(
      f"loss.class_weights = median_frequency, but classes {np.flatnonzero(pixels == 0).tolist()} have no pixel in the"
      " training labels. Use inverse_log, list the weights, or remove these classes."
    )
  frequency = pixels / images_with_class
  return (np.median(frequency) / frequency).astype(np.float32)
