"""The confusion matrix and the scores drawn from it.

One integer matrix over a whole split, [K, K], rows = label, columns = prediction; ratios are taken once, at the end, on
the host. Pixels whose label is void count nowhere. Means of per-batch scores, or float32 counts (which stall at 2^24),
would both be wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np


def confusion_matrix(label: jax.Array, prediction: jax.Array, num_classes: int) -> jax.Array:
  """Counts of one batch, [K, K] int32 (exact below 2^31 pixels per batch).

  Args:
    label: [B, H, W] int; values outside [0, K) are void.
    prediction: [B, H, W] int in [0, K).
  """

  def of_image(label, prediction):
    cell = jnp.where(label < num_classes, label.astype(jnp.int32) * num_classes + prediction, num_classes**2)
    return jnp.zeros(num_classes**2 + 1, jnp.int32).at[cell.reshape(-1)].add(1)[:-1]

  # Per image, then summed: on several devices each counts its own images, and only [K, K] numbers travel.
  return jax.vmap(of_image)(label, prediction).sum(0).reshape(num_classes, num_classes)


def add(total: np.ndarray | None, batch) -> np.ndarray:
  """Merges counts in int64 on the host; `total` None starts a new sum."""
  batch = np.asarray(batch).astype(np.int64)
  return batch if total is None else total + batch


def scores(confusion: np.ndarray) -> dict[str, float | np.ndarray]:
  """Scores of a whole split.

  Args:
    confusion: [K, K] integer counts.

  Returns:
    `mean_iou`, `pixel_accuracy`, `mean_accuracy`, `frequency_weighted_iou`, `mean_dice` as floats, and arrays [K]
    `iou_per_class`, `dice_per_class`, `accuracy_per_class`. A class with neither label nor prediction has IoU NaN and is left out of the mean; one that is
    only predicted counts as 0. Accuracy is NaN, and left out, where a class has no label. All NaN for an empty matrix.
    (The rules of TensorFlow's mean_iou, mmsegmentation and VainF's metrics.)
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
