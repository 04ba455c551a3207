"""Cross-entropy and class weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import losses


def loss(logits, label, **options):
  function = functools.partial(losses.softmax_cross_entropy, ignore_label=255, **options)
  return jax.jit(function)(jnp.asarray(logits), jnp.asarray(label))


def value_and_gradient(function, *args):
  """By the first of `args`. Compiled as one: op by op takes ten times as long."""
  return jax.jit(jax.value_and_grad(function))(*map(jnp.asarray, args))


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
  value, gradient = value_and_gradient(lambda x: loss(x, label), logits)
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
  _, gradient = value_and_gradient(lambda x: loss(x, label), logits)
  assert (np.asarray(gradient)[label == 255] == 0).all()


def test_even_nan_under_void_does_not_reach_the_loss():
  logits, label = example()
  logits[label == 255] = np.nan
  assert np.isfinite(loss(logits, label))


def test_void_may_have_any_number_that_is_no_class():
  logits, label = example()
  values = [
    losses.softmax_cross_entropy(jnp.asarray(logits), jnp.where(label == 255, void, label), ignore_label=void)
    for void in (255, -1, 4)
  ]
  assert values[0] == values[1] == values[2]


def test_all_void_batch_gives_zero_loss_and_gradient():
  logits, label = example()
  label[:] = 255
  value, gradient = value_and_gradient(lambda x: loss(x, label), logits)
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


# Name in losses.npz -> our function, and which logits it takes. Those of VainF divide by all pixels, void ones included.
TORCH = {
  "smp_dice_multiclass": (losses.dice, "multi"),
  "smp_dice_multiclass_smooth1": (functools.partial(losses.dice, smooth=1.0), "multi"),
  "smp_dice_multiclass_weighted": (losses.dice, "weighted"),
  "smp_dice_binary": (losses.dice, "binary"),
  "smp_jaccard_multiclass": (losses.jaccard, "multi"),
  "smp_jaccard_multiclass_smooth1": (functools.partial(losses.jaccard, smooth=1.0), "multi"),
  "smp_jaccard_multiclass_weighted": (losses.jaccard, "weighted"),
  "smp_jaccard_binary": (losses.jaccard, "binary"),
  "smp_focal_multiclass_gamma2": (functools.partial(losses.focal, one_vs_rest=True), "multi"),
  "smp_focal_binary": (losses.focal, "binary"),
  "vainf_focal_alpha1_gamma2": (losses.focal, "all pixels"),
  "vainf_focal_default": (functools.partial(losses.focal, gamma=0.0), "all pixels"),
  "smp_lovasz_multiclass": (losses.lovasz, "multi"),
  "smp_lovasz_multiclass_per_image": (functools.partial(losses.lovasz, per_image=True), "multi"),
  "smp_lovasz_binary": (losses.lovasz, "binary"),
  "smp_soft_bce_binary": (losses.binary_cross_entropy, "binary"),
}


@pytest.mark.parametrize("name", TORCH)
def test_losses_equal_the_pytorch_libraries_in_value_and_gradient(shared, name):
  z = np.load(shared / "reference/torch/fixtures/losses.npz")
  function, kind = TORCH[name]
  logits, label = (z["binary_logits"], z["binary_label"][:, 0]) if kind == "binary" else (z["logits"], z["label"])
  share = (label != 255).mean() if kind == "all pixels" else 1.0
  options = dict(class_weights=z["weight"]) if kind == "weighted" else {}

  def of(x):
    return function(x, jnp.asarray(label), ignore_label=255, **options) * share

  value, gradient = value_and_gradient(of, logits.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(value, z[name], rtol=2e-6)
  want = z[f"{name}__grad"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(gradient, want, atol=2e-5 * np.abs(want).max())


def binary_example(seed=0):
  logits, label = example(seed, num_classes=2)
  return logits[..., :1], label


FUNCTIONS = {
  "bce": losses.binary_cross_entropy,
  "dice": losses.dice,
  "jaccard": losses.jaccard,
  "focal": losses.focal,
  "lovasz": losses.lovasz,
}
CASES = [(name, head) for name in FUNCTIONS for head in ("binary", "multi") if (name, head) != ("bce", "multi")]


@pytest.mark.parametrize("name, head", CASES)
def test_void_pixels_are_as_if_cut_out_of_every_loss(name, head):
  logits, label = binary_example() if head == "binary" else example()
  keep = label.reshape(-1) != 255
  cut = (logits.reshape(1, 1, -1, logits.shape[-1])[:, :, keep], label.reshape(1, 1, -1)[:, :, keep])
  logits[label == 255] = np.nan
  of = functools.partial(FUNCTIONS[name], ignore_label=255)
  value, gradient = value_and_gradient(of, logits, label)
  np.testing.assert_allclose(value, jax.jit(of)(*map(jnp.asarray, cut)), rtol=1e-5)
  assert (np.asarray(gradient)[label == 255] == 0).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("name, head", CASES)
def test_batches_of_void_or_of_one_class_give_finite_losses_and_gradients(name, head):
  logits, label = binary_example() if head == "binary" else example()
  of = jax.jit(jax.value_and_grad(functools.partial(FUNCTIONS[name], ignore_label=255)))
  for fill in (255, 0, 1):
    value, gradient = of(jnp.asarray(logits), jnp.full(label.shape, fill))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert fill != 255 or (value == 0 and (gradient == 0).all())


@pytest.mark.parametrize("name", ["dice", "jaccard", "lovasz"])
def test_overlap_losses_are_0_for_the_truth_and_1_for_its_opposite(name):
  _, label = example()
  sure = 40.0 * (label[..., None] == np.arange(4))
  of = jax.jit(functools.partial(FUNCTIONS[name], ignore_label=255))
  assert float(of(jnp.asarray(sure, jnp.float32), jnp.asarray(label))) == pytest.approx(0, abs=1e-6)
  wrong = np.roll(sure, 1, axis=-1)
  assert float(of(jnp.asarray(wrong, jnp.float32), jnp.asarray(label))) == pytest.approx(1, abs=1e-6)


def test_binary_cross_entropy_is_softmax_over_0_and_the_logit_weights_included():
  logits, label = binary_example()
  border = np.random.default_rng(3).random(label.shape).astype(np.float32)
  options = dict(ignore_label=255, class_weights=np.array([0.3, 2.0]), extra_weight=jnp.asarray(border))
  got = losses.binary_cross_entropy(jnp.asarray(logits), jnp.asarray(label), **options)
  two = np.concatenate([np.zeros_like(logits), logits], -1)
  want = losses.softmax_cross_entropy(jnp.asarray(two), jnp.asarray(label), **options)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_an_auxiliary_heads_loss_is_the_whole_sum_again_times_its_weight():
  (logits, label), (auxiliary, _) = binary_example(0), binary_example(1)
  terms, border = ("bce", "dice:0.5"), (label == 0).astype(np.float32)
  alone = losses.make_loss(ignore_label=255, terms=terms, border_weight=3.0)
  both = losses.make_loss(ignore_label=255, terms=terms, border_weight=3.0, auxiliary_weight=0.25)
  want = alone(logits, label, 0, border) + 0.25 * alone(auxiliary, label, 0, border)
  np.testing.assert_allclose(both(logits, label, 0, border, auxiliary), want, rtol=1e-6)


def test_a_sum_of_terms_is_the_weighted_sum_and_the_border_map_weighs_pixels():
  logits, label = binary_example()
  logits, label = jnp.asarray(logits), jnp.asarray(label)
  both = losses.make_loss(ignore_label=255, terms=("bce", "dice:0.5"))(logits, label, 0)
  want = losses.binary_cross_entropy(logits, label, ignore_label=255) + 0.5 * losses.dice(
    logits, label, ignore_label=255
  )
  np.testing.assert_allclose(both, want, rtol=1e-6)
  border = (label == 0).astype(jnp.float32)
  weighed = losses.make_loss(ignore_label=255, terms=("bce",), border_weight=10.0)(logits, label, 0, border)
  want = losses.binary_cross_entropy(logits, label, ignore_label=255, class_weights=np.array([11.0, 1.0]))
  np.testing.assert_allclose(weighed, want, rtol=1e-6)


@pytest.mark.parametrize(
  "terms, message",
  [
    (("tversky",), "'tversky': choose each of cross_entropy, bce, dice"),
    (("dice", "dice:2"), "'dice:2': choose each"),
    (("dice:x",), "'dice:x': its weight must be a number above 0"),
    (("dice:-1",), "'dice:-1': its weight"),
    ((), "name at least one"),
  ],
)
def test_terms_that_mean_nothing_say_so(terms, message):
  with pytest.raises(ValueError, match=message):
    losses.parse_terms(terms)


def test_a_softmax_over_one_class_is_refused_with_the_remedy():
  with pytest.raises(ValueError, match="cross_entropy is 0 over a single class: with head = 'sigmoid', use bce"):
    losses.check_terms(("cross_entropy", "dice"), sigmoid=True)
  with pytest.raises(ValueError, match="bce needs the one-logit head: set head = 'sigmoid', or use cross_entropy"):
    losses.check_terms(("bce",), sigmoid=False)


def test_focal_weighs_pixels_by_the_alpha_of_their_class():
  """Equation 5 of the paper, by hand: one pixel of each class, probability of the true class 1/2."""
  alpha, label = np.array([0.25, 0.75]), jnp.array([[[0, 1]]])
  want = -(0.25 + 0.75) * 0.5**2 * np.log(0.5) / 2
  for channels in (1, 2):
    got = losses.focal(jnp.zeros((1, 1, 2, channels)), label, ignore_label=255, class_weights=alpha)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_lovasz_weighs_the_losses_of_the_classes_that_are_present():
  """By numpy: sorted errors times the growth of the Jaccard loss (algorithm 1), the weighted mean over present classes."""
  logits, label = example()
  label[label == 3] = 255
  valid = label != 255
  probability = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))[valid]
  weights, terms = np.array([0.5, 2.0, 0.0, 7.0]), []
  for k in range(3):
    truth = label[valid] == k
    error = np.abs(truth - probability[:, k])
    order = np.argsort(-error, kind="stable")
    jaccard = 1 - (truth.sum() - truth[order].cumsum()) / (truth.sum() + (~truth[order]).cumsum())
    terms.append(weights[k] * (error[order] * np.diff(jaccard, prepend=0)).sum())
  weighted = jax.jit(functools.partial(losses.lovasz, ignore_label=255, class_weights=weights))
  got = weighted(jnp.asarray(logits), jnp.asarray(label))
  np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "lovasz", "dice", "jaccard"])
def test_class_weights_change_every_loss_that_takes_them_and_give_no_nan(name):
  logits, label = (jnp.asarray(x) for x in example(num_classes=2))
  values = [
    jax.jit(jax.value_and_grad(losses.make_loss(ignore_label=255, terms=(name,), class_weights=weights)))(
      logits, label, 0
    )
    for weights in (None, np.array([1.0, 0.0]), np.array([0.2, 3.0]))
  ]
  assert all(np.isfinite(value) and np.isfinite(gradient).all() for value, gradient in values)
  for weighted, _ in values[1:]:
    assert abs(weighted / values[0][0] - 1) > 0.01


@pytest.mark.parametrize("name", ["dice", "jaccard", "lovasz"])
def test_class_weights_of_one_logit_are_refused_where_they_would_cancel(name):
  logits, label = (jnp.asarray(x) for x in binary_example())
  with pytest.raises(ValueError, match="class_weights weigh nothing with one logit"):
    losses.make_loss(ignore_label=255, terms=("bce", name), class_weights=np.array([1.0, 0.0]))(logits, label, 0)
