"""The confusion matrix and its scores, against mmsegmentation, VainF, official DeepLab, and hand numbers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from segjax import metrics, sharding, steps

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
