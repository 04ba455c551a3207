"""The confusion matrix and the scores drawn from it.

One integer matrix over a whole split, [K, K], rows = label, columns = prediction; ratios are taken once, at the end, on
the host. Pixels whose label is void count nowhere. Means of per-batch scores, or float32 counts (which stall at 2^24),
would both be wrong.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def confusion_matrix(label: jax.Array, prediction: jax.Array, num_classes: int) -> jax.Array:
  """Counts of one batch, [K, K] int32 (exact below 2^31 pixels per batch).

  Args:
    label: [B, H, W] int; values outside [0, K) are void.
    prediction: [B, H, W] int in [0, K).
  """
  return _histogram(label, prediction, num_classes, num_classes)


def confusion_at_thresholds(label: jax.Array, probability: jax.Array, thresholds: Sequence[float]) -> jax.Array:
  """Counts of one batch of two classes, [T, 2, 2] int32: `confusion_matrix` of `probability > t` for each threshold.

  One histogram over the bins between thresholds, whose cumulative sum counts what lies above each: a scatter per threshold
  takes 12 to 23 times as long (benchmarks/kernels.md).

  Args:
    label: [B, H, W] int; other values than 0 and 1 are void.
    probability: [B, H, W] float, of the second class; NaN lies above nothing.
    thresholds: T of them, rising.
  """
  bins = sum((probability > t).astype(jnp.int32) for t in thresholds)  # How many thresholds it exceeds.
  counts = _histogram(label, bins, 2, len(thresholds) + 1)
  above = jnp.cumsum(counts[:, :0:-1], axis=1)[:, ::-1]  # [2, T]
  return jnp.stack([counts.sum(1, keepdims=True) - above, above], axis=-1).transpose(1, 0, 2)


def _histogram(label, value, num_classes, num_values):
  """[num_classes, num_values] int32, how often they meet; labels outside [0, num_classes) count nowhere."""

  def of_image(label, value):
    cell = jnp.where(label < num_classes, label.astype(jnp.int32) * num_values + value, num_classes * num_values)
    return jnp.zeros(num_classes * num_values + 1, jnp.int32).at[cell.reshape(-1)].add(1)[:-1]

  # Per image, then summed: on several devices each counts its own images, and only the counts travel.
  return jax.vmap(of_image)(label, value).sum(0).reshape(num_classes, num_values)


def add(total: np.ndarray | None, batch) -> np.ndarray:
  """Adds counts in int64 on the host; `total` None: the first."""
  batch = np.asarray(batch).astype(np.int64)
  return batch if total is None else total + batch


def scores(confusion: np.ndarray) -> dict[str, float | np.ndarray]:
  """Scores of a whole split.

  Args:
    confusion: [K, K] integer counts.

  Returns:
    `mean_iou`, `pixel_accuracy`, `mean_accuracy`, `frequency_weighted_iou`, `mean_dice` as floats, and arrays [K]
    `iou_per_class`, `dice_per_class`, `accuracy_per_class`. A class with neither label nor prediction has IoU NaN and is
    left out of the mean; one that is only predicted counts as 0. Accuracy is NaN, and left out, where a class has no
    label. All NaN for an empty matrix. (The rules of TensorFlow's mean_iou, mmsegmentation and VainF's metrics.)
  """
  confusion = np.asarray(confusion, np.float64)  # Exact up to 2^53 pixels.
  hits, truth, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
  with np.errstate(invalid="ignore", divide="ignore"):
    iou = hits / (truth + predicted - hits)
    dice = 2 * hits / (truth + predicted)
    accuracy = hits / truth
    share = truth / truth.sum()
    pixel_accuracy = hits.sum() / truth.sum()
  return dict(
    mean_iou=_mean(iou),
    pixel_accuracy=float(pixel_accuracy),
    mean_accuracy=_mean(accuracy),
    frequency_weighted_iou=float((share[share > 0] * iou[share > 0]).sum()) if (share > 0).any() else float("nan"),
    mean_dice=_mean(dice),
    iou_per_class=iou,
    dice_per_class=dice,
    accuracy_per_class=accuracy,
  )


def _mean(values: np.ndarray) -> float:
  return float(values[~np.isnan(values)].mean()) if (~np.isnan(values)).any() else float("nan")


def collapsed_class(confusion: np.ndarray) -> int | None:
  """The class that takes over 99 % of the predictions though under 95 % of the labels are its own, or None.

  Loss and pixel accuracy can look well while a network predicts nothing but background; this tells.
  """
  confusion = np.asarray(confusion, np.float64)
  if not confusion.sum():
    return None
  predicted = confusion.sum(0) / confusion.sum()
  truth = confusion.sum(1) / confusion.sum()
  top = int(predicted.argmax())
  return top if predicted[top] > 0.99 and truth[top] < 0.95 else None
