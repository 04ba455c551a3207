"""Which examples a step sees: a pure function of (seed, step), so that a checkpoint stores no data position.

Epochs follow each other without a gap: step n takes positions n * batch_size to (n + 1) * batch_size of the endless
row of freshly shuffled epochs. The shuffle sorts by an integer hash written out below rather than by a library's
generator, whose stream may change with its version.
"""

import functools

import numpy as np

PADDING = -1  # The id of an example that fills up the last evaluation batch; it loads as all void.


def mix(*values) -> np.ndarray:
  """A 64-bit hash of integers or integer arrays (broadcast), by the SplitMix64 finaliser (Steele et al. 2014)."""
  state = np.zeros((), np.uint64)
  with np.errstate(over="ignore"):
    for value in values:
      state = (state ^ np.asarray(value).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
      state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
      state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
      state = state ^ (state >> np.uint64(31))
  return state


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The ids 0 .. num_examples - 1 in the order of this epoch, [num_examples] int64."""
  return np.argsort(mix(seed, epoch, np.arange(num_examples)), kind="stable")


def train_ids(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
  """Example ids of a training step, [batch_size] int64; may straddle two epochs."""
  position = np.arange(step * batch_size, (step + 1) * batch_size)
  epochs, offsets = np.divmod(position, num_examples)
  return np.array([permutation(seed, int(e), num_examples)[p] for e, p in zip(epochs, offsets)], np.int64)


def eval_ids(step: int, batch_size: int, num_examples: int) -> np.ndarray:
  """Example ids of an evaluation step, [batch_size] int64: each once, in order, then `PADDING`."""
  position = np.arange(step * batch_size, (step + 1) * batch_size)
  return np.where(position < num_examples, position, PADDING)


def num_eval_steps(batch_size: int, num_examples: int) -> int:
  """Batches that show every example once; the same number on every host."""
  return -(-num_examples // batch_size)
