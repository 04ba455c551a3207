"""ClassMix within the batch (Olsson et al. 2021, "ClassMix: Segmentation-Based Data Augmentation", arXiv 2007.07936)."""

import jax
import jax.numpy as jnp

from segjax.augment import labels


def mix(key, crops, probability: float, num_classes: int):
  """Pastes half of the classes (rounded down) that crop i + 1 of the global batch shows into crop i, with their labels.

  The last one takes them from the first. The pair and the draw depend on the row of the global batch alone, so every mesh
  mixes the same, bit for bit. It costs one exchange: each device gets one crop of its neighbour's, whatever the batch.
  Classes are those of the true labels, where the paper has a teacher's; void is never pasted.

  Args:
    key: of this step.
    crops: image [B, h, w, 3], label [B, h, w] int32, and border [B, h, w] or None.
    probability: that a crop is given anything.
    num_classes: labels below it are classes, others void.

  Returns:
    The same.
  """
  label = crops[1]
  given = jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), crops)

  numbers = jnp.arange(num_classes)

  def choose(index, label):
    act_key, class_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, index), 2))
    present = labels.present(label, num_classes)
    # Ranks of random numbers, those of absent classes last. By comparisons, as XLA:CPU is slow to sort and to scatter.
    drawn = jnp.where(present, jax.random.uniform(class_key, present.shape), 2.0)
    before = (drawn[None] < drawn[:, None]) | ((drawn[None] == drawn[:, None]) & (numbers[None] < numbers[:, None]))
    pasted = (before.sum(1) < present.sum() // 2) & jax.random.bernoulli(act_key, probability)
    return pasted.at[label].get(mode="fill", fill_value=False)

  pasted = jax.vmap(choose)(jnp.arange(len(label)), given[1])
  return jax.tree.map(
    lambda new, old: jnp.where(pasted.reshape(*pasted.shape, *(1,) * (old.ndim - 3)), new, old), given, crops
  )
