"""The counts of an evaluation and the scores drawn from them.

Counts are integers that are added up over a whole split, so that they are the same for any batches and any mesh, and take
as much memory for any number of images; ratios are taken once, at the end, on the host. Pixels whose label is void count
nowhere. Means of per-batch scores, or float32 counts (which stall at 2^24), would both be wrong.

The confusion matrix is [K, K], rows = label, columns = prediction.
"""

import heapq
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from segjax import kernels

BOUNDARY_WIDTH = 0.02  # Of an image's diagonal.
BINS = 15  # Of a reliability diagram,
FINE_BINS = 256  # each of which is counted in so many parts.


def confusion_matrix(label: jax.Array, prediction: jax.Array, num_classes: int) -> jax.Array:
  """Counts of one batch, [K, K] int32 (exact below 2^31 pixels per batch).

  Args:
    label: [B, H, W] int; values outside [0, K) are void.
    prediction: [B, H, W] int in [0, K).
  """
  return _histograms(label, prediction, num_classes, num_classes).sum(0)


def image_counts(label: jax.Array, prediction: jax.Array, size: jax.Array, num_classes: int) -> dict[str, jax.Array]:
  """Counts of one batch: of its pixels, of those near the boundaries of classes, and of each image.

  The boundary of a class is what erosion by a square takes from its mask (Cheng et al. 2021, "Boundary IoU", arXiv 2103.16562,
  section 4.1, and the authors' code): its pixels less than d + 1 rows and columns from another class or the image's edge,
  where d is 0.02 of the image's diagonal, rounded, and at least 1. Void pixels are neither a class nor an edge: they are
  looked past, in label and prediction alike.

  Args:
    label: [B, H, W] int; values outside [0, K) are void.
    prediction: [B, H, W] int in [0, K).
    size: [B, 2] int, (h, w) of each image in the top left corner, outside which all is void.
    num_classes: K, at most 255.

  Returns:
    `confusion`, [K, K] int32, as of `confusion_matrix`; `boundary`, [3, K] int32: pixels of the boundaries of a class in the
    label, in the prediction, and in both; `images`, [B, 3, K] int32: the same three numbers of whole classes, of each image.
  """
  void = (label < 0) | (label >= num_classes)
  near = _apart([_near_boundary(classes, void, size) for classes in (label, prediction)])
  rows, columns = (2 * x.astype(jnp.int32) + edge for x, edge in zip((label, prediction), near))
  counts = _histograms(jnp.where(void, 2 * num_classes, rows), columns, 2 * num_classes, 2 * num_classes)
  counts = counts.reshape(-1, num_classes, 2, num_classes, 2)
  confusions, at_boundary = counts.sum((2, 4)), counts.sum(0)
  boundary = at_boundary[:, 1].sum((1, 2)), at_boundary[..., 1].sum((0, 1)), at_boundary[:, 1, :, 1].diagonal()
  images = confusions.sum(2), confusions.sum(1), confusions.diagonal(axis1=1, axis2=2)
  return dict(confusion=confusions.sum(0), boundary=jnp.stack(boundary), images=jnp.stack(images, axis=1))


def _near_boundary(classes, void, size):
  """Whether another class or the image's edge is within d pixels, along rows or columns, of each pixel that is not void."""
  lengths = [size[:, axis].reshape(-1, 1, 1) for axis in (0, 1)]
  places = [jnp.arange(n).reshape(shape) for n, shape in zip(classes.shape[1:], ((1, -1, 1), (1, 1, -1)))]
  most = max(1, round(BOUNDARY_WIDTH * float(np.hypot(*classes.shape[1:]))))
  # Rounded as the authors' code does, to even, and in integers, so that no device rounds otherwise.
  number = np.arange(1, most + 1)
  square = sum(length.astype(jnp.int32) ** 2 for length in lengths)
  halves = np.round((number - 0.5) / BOUNDARY_WIDTH).astype(np.int32) ** 2 - (number % 2 == 0)
  width = jnp.maximum((square > halves.reshape(1, 1, -1)).sum(-1, keepdims=True), 1)
  distance = [jnp.minimum(place, length - 1 - place) for place, length in zip(places, lengths)]
  # All that a window shows is one class where its largest and its smallest class are the same; 0 is what is looked past.
  above = jnp.where(void, 0, classes + 1).astype(jnp.uint8)
  below = jnp.where(void, 0, 255 - classes).astype(jnp.uint8)
  largest, smallest = _window_max(above, width, most), 255 - _window_max(below, width, most)
  return (largest - 1 != smallest) | (distance[0] < width) | (distance[1] < width)


def _apart(x):
  """The same, computed once: XLA:CPU would compute it anew for each that reads it, in 9 times the time."""
  return kernels.fastest(lambda x: x, **dict.fromkeys(("cpu", "split_cpu"), jax.lax.optimization_barrier))(x)


def _window_max(x, radius, most: int):
  """The largest of x [B, H, W] at most `radius` [B, 1, 1] >= 1 rows and columns away, where all these are in the array.

  Windows double, and then grow by the rest of the radius, as two overlapping ones make a larger one: as many passes as the
  radius has binary digits, twice. (A window of each image's own size is nothing that `lax.reduce_window` has.)
  """
  doubling = [2**n for n in range(most.bit_length() - 1)]
  passes = [(s, radius >= 2 * s) for s in doubling]
  passes += [(s, (radius >= 2 * s) & (radius & s > 0)) for s in doubling[::-1]]
  for axis in (1, 2):
    pad = [(0, 0)] * 3
    pad[axis] = (1 + 2 * sum(doubling),) * 2
    x = jnp.pad(x, pad)

    def part(x, start, axis=axis):
      return jax.lax.slice_in_dim(x, max(start, 0), x.shape[axis] + min(start, 0), axis=axis)

    x = jnp.maximum(jnp.maximum(part(part(x, 2), 0), part(x, -2)), part(part(x, 1), -1))
    for s, grows in passes:
      x = jnp.where(grows, jnp.maximum(part(x, 2 * s), part(x, -2 * s)), part(part(x, s), -s))
    x = _apart(x)
  return x


def reliability_counts(label: jax.Array, prediction: jax.Array, confidence: jax.Array, num_classes: int) -> jax.Array:
  """Counts of one batch by confidence, [2, BINS * FINE_BINS] int32: pixels predicted wrongly, and rightly.

  Args:
    label, prediction: as of `confusion_matrix`.
    confidence: [B, H, W] float in [0, 1], the probability of the predicted class.
  """
  bins = jnp.clip(confidence * (BINS * FINE_BINS), 0, BINS * FINE_BINS - 1).astype(jnp.int32)
  void = (label < 0) | (label >= num_classes)
  return _histograms(jnp.where(void, 2, label == prediction), bins, 2, BINS * FINE_BINS).sum(0)


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
  counts = _histograms(label, bins, 2, len(thresholds) + 1).sum(0)
  above = jnp.cumsum(counts[:, :0:-1], axis=1)[:, ::-1]  # [2, T]
  return jnp.stack([counts.sum(1, keepdims=True) - above, above], axis=-1).transpose(1, 0, 2)


def _histograms(label, value, num_classes, num_values):
  """[B, num_classes, num_values] int32, how often they meet in each image; labels outside [0, num_classes) count nowhere."""

  def of_image(label, value):
    cell = jnp.where(label < num_classes, label.astype(jnp.int32) * num_values + value, num_classes * num_values)
    return jnp.zeros(num_classes * num_values + 1, jnp.int32).at[cell.reshape(-1)].add(1)[:-1]

  # Per image, and summed by who calls: on several devices each counts its own images, and only the counts travel.
  return jax.vmap(of_image)(label, value).reshape(-1, num_classes, num_values)


def add(total: np.ndarray | None, batch) -> np.ndarray:
  """Adds counts in int64 on the host; `total` None: the first."""
  batch = np.asarray(batch).astype(np.int64)
  return batch if total is None else total + batch


class ImageScores:
  """Scores of single images, added up one after another, and which images were the worst and the median.

  An image's IoU (and Dice) is the mean over the classes in its label or prediction, by the rules of `scores`; that of a split
  is the mean over its images, so that small images and rare classes weigh as others do (Csurka et al. 2013, "What is a good
  evaluation measure for semantic segmentation?", section 3). An image whose pixels are all void counts nowhere.

  It remembers `keep` images and a sample: those SAMPLE images whose ids have the least checksums, so the same ones in any
  order. In larger splits the median is the sample's.

  Attributes:
    count: of images.
  """

  SAMPLE = 1024

  def __init__(self, num_classes: int, keep: int):
    self.count, self._keep = 0, keep
    self._sums, self._occurs = np.zeros((2, num_classes + 1)), np.zeros(num_classes + 1, np.int64)
    self._worst: list[tuple[float, int]] = []  # Heaps of (-IoU, -id) and (-checksum, id, IoU).
    self._sample: list[tuple[int, int, float]] = []

  def add(self, ids: np.ndarray, counts: np.ndarray) -> None:
    """Adds images.

    Args:
      ids: [B]; negative ones are no images.
      counts: [B, 3, K] of `image_counts`.
    """
    for index, (truth, predicted, hits) in zip(ids.tolist(), np.asarray(counts, np.int64)):
      if index < 0 or not truth.sum():
        continue
      with np.errstate(invalid="ignore"):
        values = np.stack([hits / (truth + predicted - hits), 2 * hits / (truth + predicted)])
      present = ~np.isnan(values[0])
      values = np.concatenate([values, values[:, present].mean(1, keepdims=True)], axis=1)
      self.count += 1
      self._sums += np.where(np.isnan(values), 0, values)
      self._occurs += np.append(present, True)
      self._remember(index, float(values[0, -1]))

  def _remember(self, index: int, iou: float) -> None:
    checksum = zlib.crc32(index.to_bytes(8, "little"))
    for heap, item, most in (
      (self._worst, (-iou, -index), self._keep),
      (self._sample, (-checksum, index, iou), self.SAMPLE),
    ):
      heapq.heappush(heap, item)
      if len(heap) > most:
        heapq.heappop(heap)

  def scores(self) -> dict[str, float | np.ndarray]:
    """`image_iou` and `image_dice`, and arrays [K] `image_iou_per_class` and `image_dice_per_class`: the means over those images
    that have the class in label or prediction; NaN where none has."""
    with np.errstate(invalid="ignore"):
      means = self._sums / self._occurs
    found = {}
    for name, values in zip(("image_iou", "image_dice"), means):
      found |= {name: float(values[-1]), f"{name}_per_class": values[:-1]}
    return found

  def worst(self) -> list[tuple[int, float]]:
    """(id, IoU) of the worst images, the worst first."""
    return [(-index, -iou) for iou, index in sorted(self._worst, reverse=True)]

  def median(self) -> list[tuple[int, float]]:
    """(id, IoU) of the images next to the median, `keep` of them, by rising IoU; none that is among the worst."""
    worst = {index for index, _ in self.worst()}
    ordered = sorted((iou, index) for _, index, iou in self._sample)
    middle = (len(ordered) - 1) / 2
    nearest = sorted(range(len(ordered)), key=lambda place: abs(place - middle))
    chosen = [ordered[place] for place in nearest if ordered[place][1] not in worst][: self._keep]
    return [(index, iou) for iou, index in sorted(chosen)]


class Totals:
  """The counts of a whole split, from those of its batches.

  Attributes:
    confusion: [K, K] int64. boundary: [3, K] int64, as of `image_counts`. reliability: [2, BINS * FINE_BINS] int64.
    sweep: [T, 2, 2] int64, of `confusion_at_thresholds`; None where there is none.
    images: of `ImageScores`.

  Args:
    keep: number of the worst images, and of those next to the median, to remember.
  """

  def __init__(self, num_classes: int, keep: int = 0):
    self.confusion = np.zeros((num_classes, num_classes), np.int64)
    self.boundary = np.zeros((3, num_classes), np.int64)
    self.reliability = np.zeros((2, BINS * FINE_BINS), np.int64)
    self.sweep, self.images = None, ImageScores(num_classes, keep)

  def add(self, counts: dict) -> None:
    """Adds what an eval step counted, see `steps.make_eval_step`."""
    for name in ("confusion", "boundary", "reliability"):
      setattr(self, name, add(getattr(self, name), counts[name]))
    if "sweep" in counts:
      self.sweep = add(self.sweep, counts["sweep"])
    self.images.add(np.asarray(counts["id"]), counts["images"])


def boundary_scores(boundary: np.ndarray) -> dict[str, float | np.ndarray]:
  """Boundary IoU: that of the boundaries of `image_counts`, of a whole split (Cheng et al. 2021, arXiv 2103.16562, equation 2).

  Unlike IoU it does not grow with an object's size: it tells outlines that are missed by a little. The paper scores objects
  one by one; here the pixels of a class are added up over the split, as for mean IoU.

  Args:
    boundary: [3, K] integer counts.

  Returns:
    `boundary_iou_per_class` [K], NaN for a class with neither label nor prediction, and their mean `boundary_iou`.
  """
  truth, predicted, hits = np.asarray(boundary, np.float64)
  with np.errstate(invalid="ignore"):
    iou = hits / (truth + predicted - hits)
  return dict(boundary_iou=_mean(iou), boundary_iou_per_class=iou)


def calibration(reliability: np.ndarray) -> dict[str, float | np.ndarray]:
  """Whether probabilities are what they say (Guo et al. 2017, arXiv 1706.04599, section 2, equation 3), over labelled pixels.

  Args:
    reliability: [2, BINS * FINE_BINS] integer counts of `reliability_counts`.

  Returns:
    `calibration_error`: the expected calibration error, the mean over pixels of |accuracy - confidence| of the pixel's bin, of
    BINS equal ones. A confidence is known to 1 / (2 BINS FINE_BINS) = 0.00013, and so is the error. NaN without pixels.
    Of each bin, [BINS]: `count`, `accuracy` and `confidence` (their means; NaN in an empty bin).
  """
  wrong, right = np.asarray(reliability, np.float64).reshape(2, BINS, FINE_BINS)
  centres = (np.arange(BINS * FINE_BINS).reshape(BINS, FINE_BINS) + 0.5) / (BINS * FINE_BINS)
  count = (wrong + right).sum(1)
  with np.errstate(invalid="ignore"):
    accuracy, confidence = right.sum(1) / count, ((wrong + right) * centres).sum(1) / count
    error = np.where(count > 0, count * np.abs(accuracy - confidence), 0).sum() / count.sum()
  return dict(calibration_error=float(error), count=count.astype(np.int64), accuracy=accuracy, confidence=confidence)


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
