"""Evaluation protocols: scales, mirror images, sliding windows, blank padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import inference
from segjax.models import resize

IMAGE = jax.random.normal(jax.random.key(0), (2, 23, 31, 3))


def local(image, upsample=True):
  """Logits that see 3x3 pixels and the mean of all that is shown, so that a window's edges and extent matter."""
  around = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
  h, w = image.shape[1:3]
  total = sum(around[:, a : a + h, b : b + w] * (3 * a + b + 1) for a in range(3) for b in range(3))
  return total + image.mean((1, 2), keepdims=True)


def coarse(image, upsample=True):
  """Logits of stride 4."""
  logits = image[:, ::4, ::4] * jnp.array([1.0, -2.0, 3.0]).reshape(1, 1, 1, 3)
  return resize.resize_bilinear(logits, image.shape[1:3]) if upsample else logits


def test_windows_begin_at_every_stride_and_the_last_ends_with_the_image():
  assert inference.window_corners(31, 16, 10) == [0, 10, 15]
  assert inference.window_corners(16, 16, 10) == [0]
  assert inference.window_corners(36, 16, 10) == [0, 10, 20]
  assert inference.window_corners(9, 16, 10) == [0]
  assert inference.window_corners(10, 2, 2) == [0, 2, 4, 6, 8]


local.align_corners = coarse.align_corners = True  # What all models have.
local.margin = coarse.margin = 0


@pytest.mark.parametrize("window, stride", [((16, 16), (10, 8)), ((9, 31), (9, 31)), ((64, 8), (64, 3))])
def test_overlapping_windows_are_averaged(window, stride):
  got = jax.jit(lambda image: inference.sliding_window(local, image, window, stride))(IMAGE)
  want, count = np.zeros((2, 23, 31, 3)), np.zeros((1, 23, 31, 1))
  height, width = min(window[0], 23), min(window[1], 31)
  for row in inference.window_corners(23, height, stride[0]):
    for col in inference.window_corners(31, width, stride[1]):
      part = np.s_[:, row : row + height, col : col + width]
      want[part] += local(IMAGE[part])
      count[part] += 1
  assert count.min() == 1
  np.testing.assert_allclose(got, want / count, atol=1e-5)


def test_a_window_as_large_as_the_image_is_the_whole_image():
  whole = inference.class_scores(coarse, IMAGE)
  np.testing.assert_allclose(
    inference.class_scores(coarse, IMAGE, window=(40, 40), window_stride=(20, 20)), whole, atol=1e-6
  )


def test_a_single_view_gives_logits_and_several_the_mean_probability():
  whole = inference.class_scores(coarse, IMAGE)
  np.testing.assert_allclose(whole, coarse(IMAGE), atol=1e-6)
  mirrored = coarse(IMAGE[:, :, ::-1])[:, :, ::-1]
  both = inference.class_scores(coarse, IMAGE, flip=True)
  np.testing.assert_allclose(both, (jax.nn.softmax(whole) + jax.nn.softmax(mirrored)) / 2, atol=1e-6)
  np.testing.assert_allclose(both.sum(-1), 1, atol=1e-6)


def test_flip_averaging_commutes_with_mirroring_the_image():
  options = dict(scales=(0.75, 1.25), flip=True)
  scores = inference.class_scores(coarse, IMAGE, **options)
  mirrored = inference.class_scores(coarse, IMAGE[:, :, ::-1], **options)
  np.testing.assert_allclose(mirrored[:, :, ::-1], scores, atol=1e-5)


def test_small_views_grow_to_the_logits_size_of_scale_one_first():
  view = resize.resize_bilinear(IMAGE, (12, 16))  # trunc(22 * 0.5 + 1), trunc(30 * 0.5 + 1)
  want = resize.resize_bilinear(resize.resize_bilinear(coarse(view, upsample=False), (6, 8)), (23, 31))
  np.testing.assert_allclose(inference.view_logits(coarse, IMAGE, 0.5, False), want, atol=1e-6)


def test_canvas_around_an_image_is_the_mean_pixel():
  canvas = np.full((1, 4, 5, 3), 7, np.uint8)
  got = inference.blank_padding(jnp.asarray(canvas), jnp.asarray([[2, 3]]), (1.5, 2.5, 3.5))
  assert (got[0, :2, :3] == 7).all()
  outside = np.ones((4, 5), bool)
  outside[:2, :3] = False
  assert (np.asarray(got)[0][outside] == [1.5, 2.5, 3.5]).all()


def test_padding_to_the_crop_equals_the_official_one(shared):
  z = np.load(shared / "reference/deeplab/fixtures/preprocess.npz")
  for case, (h, w) in {"crop65x97": (65, 97), "crop50x70_exact": (50, 70)}.items():
    canvas = np.zeros((1, h, w, 3), np.uint8)
    canvas[0, :50, :70] = z["image"]
    got = inference.blank_padding(jnp.asarray(canvas), jnp.asarray([[50, 70]]), (127.5,) * 3)
    np.testing.assert_array_equal(got[0], z[f"eval/{case}/image"])


def test_mirrored_padding_is_numpys_reflection_of_each_image():
  canvas = np.random.default_rng(0).integers(0, 256, (3, 11, 9, 3), dtype=np.uint8)
  sizes = [(11, 9), (7, 4), (3, 2)]  # The last is folded more than once.
  got = inference.mirrored_padding(jnp.asarray(canvas), jnp.asarray(sizes))
  for image, (h, w), result in zip(canvas, sizes, got):
    np.testing.assert_array_equal(result, np.pad(image[:h, :w], ((0, 11 - h), (0, 9 - w), (0, 0)), "reflect"))
