"""Cross-entropy and class weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import losses


def loss(logits, label, **options):
  return losses.softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(label), ignore_label=255, **options)


def example(seed=0, shape=(2, 5, 7), num_classes=4):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(*shape, num_classes)).astype(np.float32)
  label = rng.integers(0, num_classes, shape)
  label[rng.random(shape) < 0.3] = 255
  return logits, label


def test_equals_the_textbook_formula_over_valid_pixels():
  logits, label = example()
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  valid = label != 255
  picked = np.take_along_axis(probability, np.where(valid, label, 0)[..., None], -1)[..., 0]
  np.testing.assert_allclose(loss(logits, label), -np.log(picked[valid]).mean(), rtol=1e-6)


def test_reference_values_of_official_deeplab_and_torch(shared):
  """No upsampling is needed where logits and labels have one size: torch's case; and the class-weighted numerator."""
  z = np.load(shared / "reference/torch/fixtures/losses.npz")
  logits, label = z["logits"].transpose(0, 2, 3, 1), z["label"]
  value, gradient = jax.value_and_grad(lambda x: loss(x, label))(jnp.asarray(logits))
  np.testing.assert_allclose(value, z["torch_ce_mean"], rtol=1e-6)
  np.testing.assert_allclose(gradient.transpose(0, 3, 1, 2), z["torch_ce_mean__grad"], atol=1e-7)
  # torch divides by the sum of weights, official DeepLab and segjax by the count.
  weights, valid = z["weight"], label != 255
  rescale = weights[label[valid]].sum() / valid.sum()
  weighted = loss(logits, label, class_weights=weights)
  np.testing.assert_allclose(weighted, z["torch_ce_weighted_mean"] * rescale, rtol=1e-5)


def test_void_adds_exactly_nothing_to_loss_and_gradient():
  logits, label = example()
  other = logits.copy()
  other[label == 255] = 1e4
  assert loss(logits, label) == loss(other, label)
  gradient = jax.grad(lambda x: loss(x, label))(jnp.asarray(logits))
  assert (np.asarray(gradient)[label == 255] == 0).all()


def test_even_nan_under_void_does_not_reach_the_loss():
  logits, label = example()
  logits[label == 255] = np.nan
  assert np.isfinite(loss(logits, label))


def test_all_void_batch_gives_zero_loss_and_gradient():
  logits, label = example()
  label[:] = 255
  value, gradient = jax.value_and_grad(lambda x: loss(x, label))(jnp.asarray(logits))
  assert value == 0 and (np.asarray(gradient) == 0).all()


def test_masked_equals_dropped():
  logits, label = example(shape=(1, 1, 40))
  valid = label[0, 0] != 255
  np.testing.assert_allclose(loss(logits, label), loss(logits[:, :, valid], label[:, :, valid]), rtol=1e-6)


def test_class_weights_scale_the_numerator_only():
  logits, label = np.zeros((1, 1, 2, 2), np.float32), np.array([[[0, 1]]])
  np.testing.assert_allclose(loss(logits, label, class_weights=np.array([1.0, 3.0])), 2 * np.log(2), rtol=1e-6)


def test_median_frequency_weights_by_hand():
  # Frequencies 0.8, 0.2 and 0.1 (of the pixels of images that have the class); median 0.2.
  got = losses.class_weights("median_frequency", np.array([80, 20, 5]), np.array([100, 100, 50]))
  np.testing.assert_allclose(got, [0.25, 1, 2], rtol=1e-6)


def test_inverse_log_weights_by_hand():
  got = losses.class_weights("inverse_log", np.array([75, 25]), np.array([100, 100]))
  np.testing.assert_allclose(got, [1 / np.log(1.77), 1 / np.log(1.27)], rtol=1e-6)


def test_median_frequency_names_classes_that_never_occur():
  with pytest.raises(ValueError, match=r"classes \[1\] have no pixel"):
    losses.class_weights("median_frequency", np.array([5, 0]), np.array([5, 0]))
