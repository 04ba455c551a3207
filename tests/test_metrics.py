"""The confusion matrix and its scores, against mmsegmentation, VainF, official DeepLab, and hand numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from jax.sharding import NamedSharding, PartitionSpec

from segjax import inference, metrics, sharding, steps

DATA = pathlib.Path(__file__).parent / "data"


def matrix(label, prediction, num_classes):
  return metrics.add(None, jax.jit(metrics.confusion_matrix, static_argnums=2)(label, prediction, num_classes))


def test_scores_equal_vainf_and_mmsegmentation():
  want = np.load(DATA / "torch_metrics.npz")
  confusion = matrix(want["label"], want["pred"], 21)
  np.testing.assert_array_equal(confusion, want["vainf_confusion"])
  got = metrics.scores(confusion)
  for ours, theirs in (
    ("mean_iou", "vainf_mean_iou"),
    ("pixel_accuracy", "vainf_overall_acc"),
    ("mean_accuracy", "vainf_mean_acc"),
    ("frequency_weighted_iou", "vainf_freqw_acc"),
    ("iou_per_class", "vainf_class_iou"),
  ):
    np.testing.assert_allclose(got[ours], want[theirs], rtol=1e-12, err_msg=ours)
  for ours, theirs in (
    ("iou_per_class", "mmseg_IoU"),
    ("accuracy_per_class", "mmseg_Acc"),
    ("mean_iou", "mmseg_mean_IoU"),
  ):
    np.testing.assert_allclose(got[ours], want[theirs], rtol=1e-6, err_msg=ours)


def test_mean_iou_equals_official_deeplab_after_each_image():
  want = np.load(DATA / "tf_metric_miou.npz")
  total = None
  for image in range(3):
    counts = matrix(want["labels"][image : image + 1], want["predictions"][image : image + 1], 21)
    total = metrics.add(total, counts)
    got = metrics.scores(total)["mean_iou"]
    np.testing.assert_allclose(got, want["running_miou_after_each_image"][image], rtol=1e-6)
  np.testing.assert_array_equal(total, want["confusion_rows_label_cols_pred"])


def test_void_pixels_count_nowhere():
  label = np.array([[[0, 255, 1, 255]]], np.uint8)
  confusion = matrix(label, np.array([[[0, 1, 0, 0]]], np.uint8), 2)
  np.testing.assert_array_equal(confusion, [[1, 0], [1, 0]])


def test_absent_class_is_left_out_and_false_alarm_counts_as_zero():
  scores = metrics.scores(np.array([[4, 0, 0], [0, 0, 0], [0, 0, 0]]))
  assert scores["mean_iou"] == 1.0 and np.isnan(scores["iou_per_class"][1:]).all()
  scores = metrics.scores(np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))
  assert scores["mean_iou"] == pytest.approx((0.75 + 0.0) / 2)


def test_empty_matrix_gives_nan_and_no_warning():
  scores = metrics.scores(np.zeros((3, 3), int))
  assert all(np.isnan(scores[name]) for name in ("mean_iou", "pixel_accuracy", "frequency_weighted_iou"))


@pytest.mark.parametrize("large", [2**24, 2**31, 2**40])
def test_counts_beyond_float32_and_int32_are_exact(large):
  total = metrics.add(np.array([[large, 0], [0, 1]]), np.array([[1, 0], [0, 1]], np.int32))
  assert total[0, 0] == large + 1 and total.dtype == np.int64
  assert metrics.scores(total)["mean_iou"] == 1.0


def test_one_image_of_more_than_2_24_pixels_of_one_class_is_counted_exactly():
  label = jnp.zeros((1, 4097, 4097), jnp.uint8)
  assert matrix(label, label, 2)[0, 0] == 4097**2 > 2**24


def test_any_batching_and_sharding_gives_the_same_matrix():
  rng = np.random.default_rng(0)
  label, prediction = rng.integers(0, 5, (8, 12, 10), dtype=np.uint8), rng.integers(0, 4, (8, 12, 10), dtype=np.uint8)
  label[label == 4] = 255
  whole = matrix(label, prediction, 4)
  parts = sum(matrix(label[i : i + 1], prediction[i : i + 1], 4) for i in range(8))
  mesh = sharding.make_mesh()
  put = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", "space"))) for x in (label, prediction)]
  np.testing.assert_array_equal(whole, parts)
  np.testing.assert_array_equal(whole, matrix(*put, 4))
  np.testing.assert_array_equal(whole.sum(1), [(label == k).sum() for k in range(4)])


def test_collapse_is_told_from_an_unbalanced_but_sound_prediction():
  assert metrics.collapsed_class(np.array([[80, 0], [20, 0]])) == 0
  assert metrics.collapsed_class(np.array([[98, 0], [1, 1]])) is None  # Ground truth is as one-sided.
  assert metrics.collapsed_class(np.array([[70, 10], [5, 15]])) is None
  assert metrics.collapsed_class(np.zeros((2, 2))) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sweep_counts_as_one_matrix_per_threshold_does_ties_included(dtype):
  with jax.enable_x64(dtype == "float64"):
    ties = np.array(steps.THRESHOLDS, dtype)
    values = np.concatenate([ties, np.nextafter(ties, 0), np.nextafter(ties, 1), np.array([0, 1, np.nan], dtype)])
    rng = np.random.default_rng(0)
    probability = np.concatenate([np.tile(values, 9), rng.random(900 - 9 * len(values)).astype(dtype)])
    probability = rng.permutation(probability).reshape(2, 18, 25)
    label = rng.choice([0, 1, 255], probability.shape).astype(np.uint8)
    sweep = jax.jit(metrics.confusion_at_thresholds, static_argnums=2)(label, probability, steps.THRESHOLDS)
    for counts, threshold in zip(sweep, steps.THRESHOLDS):
      want = metrics.confusion_matrix(label, jnp.asarray(probability) > threshold, 2)
      np.testing.assert_array_equal(counts, want, strict=True)


def test_a_sweep_scatters_pixels_once_whatever_the_number_of_thresholds():
  shapes = jax.ShapeDtypeStruct((1, 8, 8), np.uint8), jax.ShapeDtypeStruct((1, 8, 8), np.float32)
  text = jax.jit(metrics.confusion_at_thresholds, static_argnums=2).lower(*shapes, steps.THRESHOLDS).as_text()
  assert text.count('"stablehlo.scatter"(') == 1


def eroded_boundary(mask, width):
  """What SciPy's erosion by 3x3 squares, `width` times, takes from a mask; outside of the image is outside of the mask."""
  square = np.ones((3, 3))
  return mask & ~scipy.ndimage.binary_erosion(mask, square, iterations=width, border_value=0)


def blobs(rng, shape, num_classes, smooth):
  """Regions as segmentation has them: the largest of smoothed noises, one for each class."""
  return np.argmax([scipy.ndimage.gaussian_filter(rng.normal(size=shape), smooth) for _ in range(num_classes)], axis=0)


SIZES = [
  (40, 70),
  (75, 100),
  (1, 30),
  (120, 160),
  (90, 23),
]  # 0.02 of their diagonals: 1.6, 2.5 (to even), 0.6, 4, 1.9.


@pytest.fixture(scope="module")
def canvas():
  """label, prediction [B, H, W] uint8 and size of blobs of the sizes above on one canvas, without void in the images."""
  rng, size = np.random.default_rng(0), np.array(SIZES, np.int32)
  label = np.full((len(SIZES), 124, 160), 255, np.uint8)
  prediction = rng.integers(0, 5, label.shape).astype(np.uint8)  # What it says beside the images is of no account.
  for n, (h, w) in enumerate(SIZES):
    label[n, :h, :w] = blobs(rng, (h, w), 4, 6)
    prediction[n, :h, :w] = np.where(rng.random((h, w)) < 0.001, 4, np.roll(label[n, :h, :w], 1 + n % 2, 1))
  return label, prediction, size


counts_of = jax.jit(metrics.image_counts, static_argnums=3)


def test_boundary_iou_is_that_of_masks_eroded_one_by_one(canvas):
  label, prediction, size = canvas
  got, want = counts_of(label, prediction, size, 5), np.zeros((3, 5), np.int64)
  for n, (h, w) in enumerate(size):
    width = max(1, round(0.02 * float(np.hypot(h, w))))
    for k in range(5):
      near = [eroded_boundary(x[n, :h, :w] == k, width) for x in (label, prediction)]
      want[:, k] += [near[0].sum(), near[1].sum(), (near[0] & near[1]).sum()]
  np.testing.assert_array_equal(got["boundary"], want)
  iou = want[2] / (want[0] + want[1] - want[2])
  assert 0 < iou[1] < 1 and iou[4] == 0
  np.testing.assert_allclose(metrics.boundary_scores(want)["boundary_iou_per_class"], iou)
  assert metrics.boundary_scores(want)["boundary_iou"] == pytest.approx(iou.mean())


def test_a_boundary_is_looked_for_past_void_pixels_and_void_is_none_itself():
  """As brute force has it: another class, or the edge, within a square around a pixel. Void pixels may hold anything."""
  rng, (h, w) = np.random.default_rng(1), (80, 100)  # 0.02 of the diagonal: 2.56.
  label = blobs(rng, (h, w), 3, 5).astype(np.uint8)
  label[scipy.ndimage.binary_dilation(eroded_boundary(label == 1, 1), iterations=1)] = 255  # As VOC's outlines.
  label[30:45, 40:60] = 255
  prediction = blobs(rng, (h, w), 3, 5).astype(np.uint8)
  got, want = counts_of(label[None], prediction[None], np.array([[h, w]]), 3), np.zeros((3, 3), np.int64)
  for y, x in zip(*np.nonzero(label < 255)):
    window = np.s_[max(y - 3, 0) : y + 4, max(x - 3, 0) : x + 4]
    edge = min(y, x, h - 1 - y, w - 1 - x) < 3
    known = label[window] < 255
    near = [edge or len(set(a[window][known].tolist())) > 1 for a in (label, prediction)]
    want[0, label[y, x]] += near[0]
    want[1, prediction[y, x]] += near[1]
    want[2, label[y, x]] += near[0] and near[1] and label[y, x] == prediction[y, x]
  np.testing.assert_array_equal(got["boundary"], want)
  same = counts_of(label[None], np.where(label == 255, prediction, label)[None], np.array([[h, w]]), 3)
  assert metrics.boundary_scores(same["boundary"])["boundary_iou"] == 1


def test_confusion_of_image_counts_is_the_confusion_matrix_and_each_image_has_its_own(canvas):
  label, prediction, size = canvas
  got = counts_of(label, prediction, size, 5)
  np.testing.assert_array_equal(got["confusion"], matrix(label, prediction, 5))
  for n in range(len(size)):
    own = matrix(label[n : n + 1], prediction[n : n + 1], 5)
    np.testing.assert_array_equal(got["images"][n], [own.sum(1), own.sum(0), np.diag(own)])


def test_image_scores_are_the_means_of_what_sets_of_pixels_give(canvas):
  label, prediction, size = canvas
  images = metrics.ImageScores(5, 2)
  images.add(np.arange(5), np.asarray(counts_of(label, prediction, size, 5)["images"]))
  images.add(np.array([-1, 9]), np.array([np.ones((3, 5)), np.zeros((3, 5))]))  # No image, and one that is all void.
  own, per_class = [], [[] for _ in range(5)]
  for y, p, (h, w) in zip(label, prediction, size):
    y, p, values = y[:h, :w], p[:h, :w], []
    for k in set(np.unique(y)) | set(np.unique(p)):
      a, b = set(np.flatnonzero(y == k)), set(np.flatnonzero(p == k))
      values.append((len(a & b) / len(a | b), 2 * len(a & b) / (len(a) + len(b))))
      per_class[k].append(values[-1])
    own.append(np.mean(values, axis=0))
  scores = images.scores()
  assert images.count == 5
  np.testing.assert_allclose([scores["image_iou"], scores["image_dice"]], np.mean(own, axis=0))
  want = [np.mean(values, axis=0) for values in per_class]
  np.testing.assert_allclose(np.stack([scores["image_iou_per_class"], scores["image_dice_per_class"]], 1), want)
  order = np.argsort([iou for iou, _ in own])
  assert [index for index, _ in images.worst()] == order[:2].tolist()
  assert images.worst()[0][1] == pytest.approx(own[order[0]][0])
  assert [index for index, _ in images.median()] == order[
    2:4
  ].tolist()  # The middle one, and the next that is not worst.


def test_the_memory_of_image_scores_does_not_grow_and_no_order_alters_which_are_kept():
  rng = np.random.default_rng(0)
  hits = rng.integers(0, 1000, 6000)
  counts = np.stack([np.full(6000, 1000), np.full(6000, 1000), hits], 1)[..., None]
  found = []
  for order in (np.arange(6000), rng.permutation(6000)):
    images = metrics.ImageScores(1, 3)
    for part in np.array_split(order, 50):
      images.add(part, counts[part])
    assert len(images._worst) == 3 and len(images._sample) == images.SAMPLE
    found.append((images.worst(), images.median()))
  assert found[0] == found[1]
  assert sorted(hits[[index for index, _ in found[0][0]]]) == sorted(hits)[:3]
  iou = hits / (2000 - hits)
  assert all(abs(value - np.median(iou)) < 0.05 and value == iou[index] for index, value in found[0][1])


def test_calibration_error_is_the_papers_on_pixels_one_by_one():
  """Guo et al.'s equations 1 to 3, pixel by pixel, of confidences at the centres of the fine bins, and of any to 0.00013."""
  rng, cells = np.random.default_rng(0), metrics.BINS * metrics.FINE_BINS
  label, prediction = rng.integers(0, 3, (2, 3, 40, 50)).astype(np.uint8)
  label[rng.random(label.shape) < 0.2] = 255
  for confidence, tolerance in (
    ((rng.integers(0, cells, label.shape) + 0.5) / cells, 1e-7),
    (np.where(rng.random(label.shape) < 0.1, 1, rng.random(label.shape) ** 0.3), 1.4e-4),
  ):
    counts = jax.jit(metrics.reliability_counts, static_argnums=3)(label, prediction, confidence.astype("f4"), 3)
    got, valid = metrics.calibration(counts), label < 255
    right, sure = (label == prediction)[valid], confidence[valid]
    number, error = np.minimum((sure * 15).astype(int), 14), 0
    for m in range(15):
      if (chosen := number == m).any():
        error += chosen.mean() * abs(right[chosen].mean() - sure[chosen].mean())
        assert got["accuracy"][m] == pytest.approx(right[chosen].mean())
        assert got["confidence"][m] == pytest.approx(sure[chosen].mean(), abs=tolerance)
    assert got["count"].sum() == valid.sum() and got["calibration_error"] == pytest.approx(error, abs=tolerance)
  assert np.isnan(metrics.calibration(np.zeros((2, cells)))["calibration_error"])


def test_all_counts_are_the_same_on_any_mesh_and_in_any_batches(canvas):
  label, prediction, size = (np.concatenate([x, x[:3]]) for x in canvas)
  whole = counts_of(label, prediction, size, 5)
  mesh = sharding.make_mesh(4, 2)
  put = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in (label, prediction, size)]
  spread = counts_of(*put, 5)
  parts = [counts_of(label[i : i + 2], prediction[i : i + 2], size[i : i + 2], 5) for i in range(0, 8, 2)]
  for name in whole:
    np.testing.assert_array_equal(whole[name], spread[name])
    joined = np.concatenate([part[name] for part in parts]) if name == "images" else sum(part[name] for part in parts)
    np.testing.assert_array_equal(whole[name], joined)


def test_confidence_is_the_largest_probability_under_each_protocol():
  logits = np.random.default_rng(0).normal(0, 3, (2, 4, 5, 3)).astype("f4")
  probabilities = scipy.special.softmax(logits, -1)
  np.testing.assert_allclose(inference.confidence(logits), probabilities.max(-1), rtol=1e-5)
  np.testing.assert_array_equal(inference.confidence(probabilities, flip=True), probabilities.max(-1))
