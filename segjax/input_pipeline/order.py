"""Which examples a step sees: a pure function of (seed, step), so that a checkpoint stores no data position.

Epochs follow each other without a gap: step n takes positions n * batch_size to (n + 1) * batch_size of the endless
row of freshly shuffled epochs. The shuffle sorts by an integer hash written out below rather than by a library's
generator, whose stream may change with its version. Under a `ClassBalance` there are no epochs: each position draws a
class, and an example that holds it, from a hash of (seed, position).
"""

import functools
from collections.abc import Sequence

import numpy as np

PADDING = -1  # The id of an example that fills up the last evaluation batch; it loads as all void.
_CLASS, _EXAMPLE = (
  0x434C415353,
  0x4558414D504C45,
)  # Make the draws of `ClassBalance` differ from each other and all others.
_UNITS = 2**32  # Probabilities are whole numbers of these shares, so that no host rounds them otherwise.


class ClassBalance:
  """Rare-class sampling (DAFormer, Hoyer et al. 2022, arXiv 2111.14887, section 3.3): which examples are drawn how often.

  Class c, of the share f_c of all labelled pixels, is drawn with probability proportional to exp((1 - f_c) / temperature);
  then one of the examples that hold it, each alike, and with replacement.

  Args:
    counts: [N, K] pixels of each class in each example.
    temperature: above 0; the lower, the more often the rarest classes.

  Attributes:
    probabilities: [K] float64, of the classes.

  Raises:
    ValueError: classes that no example holds, as a sequence of their ids.
  """

  def __init__(self, counts: np.ndarray, temperature: float):
    if absent := np.flatnonzero(counts.sum(0) == 0).tolist():
      raise ValueError(absent)
    rarity = (1 - counts.sum(0) / counts.sum()) / temperature
    self.probabilities = np.exp(rarity - rarity.max())
    self.probabilities /= self.probabilities.sum()
    self._up_to = np.cumsum(np.round(_UNITS * self.probabilities).astype(np.uint64))
    self._holders: Sequence[np.ndarray] = [np.flatnonzero(column) for column in counts.T]

  def draw(self, seed: int, position: np.ndarray) -> np.ndarray:
    """Example ids at positions of the endless row of draws, [n] int64."""
    drawn = mix(seed, position, _CLASS) % self._up_to[-1]
    classes = np.searchsorted(self._up_to, drawn, side="right")
    numbers = mix(seed, position, _EXAMPLE)
    holders = [self._holders[c] for c in classes]
    return np.array([h[int(number) % len(h)] for h, number in zip(holders, numbers)], np.int64)


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


def train_ids(
  seed: int, step: int, batch_size: int, num_examples: int, balance: ClassBalance | None = None
) -> np.ndarray:
  """Example ids of a training step, [batch_size] int64; may straddle two epochs.

  Args:
    balance: how often which example is drawn; None: each once an epoch.
  """
  position = np.arange(step * batch_size, (step + 1) * batch_size)
  if balance is not None:
    return balance.draw(seed, position)
  epochs, offsets = np.divmod(position, num_examples)
  return np.array([permutation(seed, int(e), num_examples)[p] for e, p in zip(epochs, offsets)], np.int64)


def eval_ids(step: int, batch_size: int, num_examples: int) -> np.ndarray:
  """Example ids of an evaluation step, [batch_size] int64: each once, in order, then `PADDING`."""
  position = np.arange(step * batch_size, (step + 1) * batch_size)
  return np.where(position < num_examples, position, PADDING)


def num_eval_steps(batch_size: int, num_examples: int) -> int:
  """Batches that show every example once; the same number on every host."""
  return -(-num_examples // batch_size)
