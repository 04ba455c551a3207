"""Crops that hold a pixel of a class, for images of which most crops would show none of what is to be learned."""

import jax
import jax.numpy as jnp

from segjax.augment import labels


def choose_pixel(key, label, classes, probability: float):
  """A pixel of a random class among those that an image has, uniform among the pixels of this class.

  (nnU-Net, Isensee et al. 2021, supplementary note 2, oversamples foreground so, with all but the background alike.) Costs
  a look at each pixel of the canvas, and nothing else.

  Args:
    label: [H, W] uint8; values of no class are never chosen.
    classes: [K] float; class c is drawn with probability proportional to classes[c] among those in `label`.
    probability: that a pixel is chosen at all.

  Returns:
    row, column: int32 scalars; -1 where none is chosen, or no class with a probability is in `label`.
  """
  act_key, class_key, pixel_key = jax.random.split(key, 3)
  # The largest of log p + Gumbel noise is a draw by p, also of those that are there (Gumbel-max trick).
  score = jnp.log(classes.astype(jnp.float32)) + jax.random.gumbel(class_key, classes.shape, jnp.float32)
  score = jnp.where(labels.present(label, len(classes)), score, -jnp.inf)
  chosen = label == jnp.argmax(score)
  found = (score.max() > -jnp.inf) & jax.random.bernoulli(act_key, probability)
  in_row = jnp.cumsum(chosen.sum(1, dtype=jnp.int32))  # Up to and with each row.
  number = jax.random.randint(pixel_key, (), 0, jnp.maximum(in_row[-1], 1))  # Of the pixel, in reading order.
  row = jnp.argmax(in_row > number)
  before = jnp.where(row > 0, in_row[row - 1], 0)
  col = jnp.argmax(jnp.cumsum(chosen[row].astype(jnp.int32)) > number - before)
  return tuple(jnp.where(found, x, -1).astype(jnp.int32) for x in (row, col))
