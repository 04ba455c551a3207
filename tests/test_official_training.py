"""Loss, schedule, batch norm, optimiser and whole training steps against official DeepLab's own figures."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from segjax import losses, optimizer, state
from segjax.models import layers, resize
from segjax.models.deeplab_v3plus import DeepLabV3Plus
from segjax.pretrained import tf_deeplab
from tests import seeded
from tests.test_deeplab_reference import seeded_model


def load(shared, name):
  return np.load(shared / "reference/deeplab/fixtures" / name)


LOSSES = {
  "default_upsample": {},
  "no_upsample": {},
  "class_weights": {},
  "scalar_weight_0.4": {},
  "topk0.25_step0": dict(hard_fraction=0.25),
  "topk0.9_step0": dict(hard_fraction=0.9),
  "topk0.25_hem100_at_step0": dict(hard_fraction=losses.hard_fraction_at(0, 0.25, 100)),
  "topk0.25_hem100_at_step40": dict(hard_fraction=losses.hard_fraction_at(40, 0.25, 100)),
  "topk0.25_hem100_at_step500": dict(hard_fraction=losses.hard_fraction_at(500, 0.25, 100)),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_and_their_gradients_equal_the_official_ones(case, shared):
  z = load(shared, "loss.npz")
  label, options = jnp.asarray(z["labels"][..., 0].astype(np.int32)), dict(LOSSES[case])
  if case == "class_weights":
    options["class_weights"] = z["class_weights"]

  def loss(logits):
    if case == "no_upsample":
      small = resize.resize_nearest(label, logits.shape[1:3])
      return losses.softmax_cross_entropy(logits, small, ignore_label=255)
    value = losses.softmax_cross_entropy(
      resize.resize_bilinear(logits, label.shape[1:3]), label, ignore_label=255, **options
    )
    return value * (0.4 if case == "scalar_weight_0.4" else 1)

  value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(z["logits"]))
  np.testing.assert_allclose(value, z[f"loss/{case}"], rtol=2e-6)
  np.testing.assert_allclose(gradient, z[f"grad/{case}"], atol=1e-7 + 1e-5 * abs(z[f"grad/{case}"]).max())


def test_hard_pixels_of_a_void_image_are_no_loss():
  logits, label = jnp.ones((1, 2, 3, 4)), jnp.full((1, 2, 3), 255)
  loss = functools.partial(losses.softmax_cross_entropy, ignore_label=255, hard_fraction=0.5)
  value, gradient = jax.jit(jax.value_and_grad(loss))(logits, label)
  assert value == 0 and (gradient == 0).all()


def test_resizing_equals_the_official_kernels(shared):
  z = load(shared, "resize.npz")
  sizes = [key.split("/")[1] for key in z.files if key.startswith("bilinear/")]
  assert len(sizes) == 10
  for name in sizes:
    size = tuple(int(n) for n in name.split("x"))
    bilinear, nearest = (
      jax.jit(function, static_argnums=1) for function in (resize.resize_bilinear, resize.resize_nearest)
    )
    np.testing.assert_allclose(bilinear(jnp.asarray(z["src"]), size), z[f"bilinear/{name}"], atol=2e-6)
    nearest = nearest(jnp.asarray(z["labels"][..., 0]), size)
    np.testing.assert_array_equal(nearest, z[f"nearest/{name}"][..., 0])


def test_pixels_are_mapped_as_officially(shared):
  z = load(shared, "preprocess.npz")
  model = nnx.eval_shape(lambda: DeepLabV3Plus(num_classes=2, backbone="mobilenet_v2", rngs=nnx.Rngs(0)))
  np.testing.assert_allclose(model.preprocess(z["unit_range_in"]), z["unit_range_out"], atol=1e-7)
  assert (model.preprocess(np.full((1, 1, 1, 3), model.mean[0])) == 0).all()


LEARNING_RATES = [
  pytest.param("voc_poly_0.007_30000", {}),
  pytest.param("voc_finetune_poly_0.0001_30000", dict(base_lr=1e-4)),
  pytest.param("cityscapes_poly_0.01_90000", dict(base_lr=0.01, num_steps=90000)),
  pytest.param("poly_end_lr_1e-5", dict(end_lr=1e-5)),
  pytest.param("poly_decay_steps_10000", dict(num_steps=10000)),
  pytest.param("cosine_0.007_30000", dict(name="cosine")),
  pytest.param("step_0.007_x0.1_every_2000", dict(name="step", decay_every=2000, decay_factor=0.1)),
  pytest.param("poly_slow_start_100_at_1e-4_none", dict(warmup_steps=100, warmup_lr=1e-4, warmup="constant")),
  pytest.param("poly_slow_start_2000_linear_burnin", dict(warmup_steps=2000, warmup_lr=1e-4)),
]


@pytest.mark.parametrize("case, options", LEARNING_RATES)
def test_learning_rates_equal_the_official_ones(case, options, shared):
  z = json.loads((shared / "reference/deeplab/fixtures/learning_rate.json").read_text())
  assert set(z) == {"steps"} | {mark.values[0] for mark in LEARNING_RATES}
  defaults = dict(name="poly", base_lr=0.007, num_steps=30000)
  rate = optimizer.make_schedule(**{**defaults, **options})
  np.testing.assert_allclose([rate(step) for step in z["steps"]], z[case], rtol=2e-4, atol=1e-9)


@pytest.mark.parametrize("epsilon, decay", [("1e-3", "0.9997"), ("1e-5", "0.9997"), ("1e-5", "0.9")])
def test_batch_norm_equals_slims(epsilon, decay, shared):
  z = load(shared, "bn_momentum.npz")
  norm = layers.BatchNorm(5, momentum=float(decay), epsilon=float(epsilon))
  names = dict(scale="gamma", bias="beta", mean="moving_mean", var="moving_variance")
  for ours, theirs in names.items():
    getattr(norm, ours)[...] = seeded.value(f"bn/{theirs}", (5,))
  case = f"eps{epsilon}_decay{decay}"
  scale, shift = (np.float64(norm.scale[...]), np.float64(norm.bias[...]))
  got, x = norm(jnp.asarray(z["x"]), train=True), z["x"].astype(np.float64)
  exact = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + float(epsilon)) * scale + shift
  np.testing.assert_allclose(got, exact, atol=3e-6)
  # Channel 3 has mean 4 and deviation 0.009: there TensorFlow itself is 1.3e-4 off the exact value, ours is not.
  np.testing.assert_allclose(got[..., 3], z[f"{case}/y"][..., 3], atol=2e-4)
  np.testing.assert_allclose(np.delete(got, 3, -1), np.delete(z[f"{case}/y"], 3, -1), atol=2e-6)
  for ours, theirs in names.items():
    np.testing.assert_allclose(getattr(norm, ours)[...], z[f"{case}/bn/{theirs}_after"], atol=1e-6)


def test_frozen_batch_norm_trains_scale_and_bias_only():
  norm, x = layers.BatchNorm(3, frozen=True), jax.random.normal(jax.random.key(0), (2, 4, 5, 3))
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  def loss(params):
    model = nnx.merge(graphdef, params, stats, copy=True)
    return (model(x, train=True) ** 3).sum(), nnx.state(model, nnx.BatchStat)

  gradient, after = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert all((leaf != 0).all() for leaf in jax.tree.leaves(gradient))
  assert jax.tree.map(lambda a, b: bool((a == b).all()), after, stats) == jax.tree.map(lambda _: True, stats)
  np.testing.assert_array_equal(norm(x, train=True), norm(x, train=False))


def test_momentum_equals_tensorflows(shared):
  z = load(shared, "bn_momentum.npz")
  rates = jnp.asarray(z["momentum/lrs"])
  make = optimizer.make_optimizer(
    "sgd", lambda step: rates[step], momentum=0.9, nesterov=False, weight_decay=0.0, clip_norm=0.0
  )
  params = {"kernel": jnp.asarray([1.0, -2.0, 3.0])}
  opt_state = make.init(params)
  for k in range(4):
    gradient = {"kernel": params["kernel"] - jnp.asarray([0.5, k, -k])}
    updates, opt_state = make.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], z["momentum/w_after"][k], rtol=1e-6)


def official_table(shared):
  path = shared / "reference/deeplab/regularization_and_multipliers_xception65.tsv"
  return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def test_decay_and_multipliers_are_those_of_every_official_variable(shared):
  params = tf_deeplab.convert({n: np.zeros(s) for n, (s, _) in seeded.variables("xception65").items()})["params"]
  decays = traverse_util.flatten_dict(optimizer.decay_mask(params), sep="/")
  factors = {h: optimizer.lr_factors((f"!backbone:{h}", "logits/bias:2"), params) for h in (1, 10)}
  by_head = {h: traverse_util.flatten_dict(tree, sep="/") for h, tree in factors.items()}
  rows = official_table(shared)
  assert len(rows) == 440 == len(decays)
  for name, decay, _, head1, head10, _ in rows:
    path = tf_deeplab.rename(name)[1]
    assert (decays[path], by_head[1][path], by_head[10][path]) == (decay == "yes", float(head1), float(head10)), name


@pytest.mark.reference
def test_three_training_steps_equal_the_official_ones(shared, monkeypatch):
  """Frozen batch norm, multiplier 10 for the head, 2 for biases; four 65x65 images, momentum, poly, weight decay."""
  z = load(shared, "train_x65_os16_frozenbn.npz")
  weight_decay = 4e-5
  schedule = optimizer.make_schedule("poly", base_lr=1e-3, num_steps=30000)
  make = optimizer.make_optimizer(
    "sgd",
    schedule,
    momentum=0.9,
    nesterov=False,
    weight_decay=weight_decay,
    clip_norm=0.0,
    lr_multipliers=("!backbone:10", "logits/bias:2"),
  )
  graphdef, params, batch_stats = state.split(seeded_model("xception65", frozen_bn=True))
  params, batch_stats = (jax.tree.map(jnp.asarray, tree) for tree in (params, batch_stats))
  initial_stats = batch_stats
  image, label = jnp.asarray(z["image"]), jnp.asarray(z["labels"][..., 0].astype(np.int32))

  @jax.jit
  def step_fn(params, batch_stats, opt_state, mask):
    # The official mask instead of a random one.
    monkeypatch.setattr(layers, "dropout", lambda x, rate, key: x * mask / (1 - rate))

    def loss_fn(params):
      model = nnx.merge(graphdef, params, batch_stats, copy=True)
      logits = model(model.preprocess(image), train=True, key=jax.random.key(0))
      loss = losses.softmax_cross_entropy(logits, label, ignore_label=255)
      return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (loss, batch_stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
    mask_of = optimizer.decay_mask(params)
    squares = jax.tree.map(lambda w, m: (w**2).sum() / 2 if m else 0.0, params, mask_of)
    total_gradient = jax.tree.map(lambda g, w, m: g + weight_decay * w if m else g, gradient, params, mask_of)
    updates, opt_state = make.update(gradient, opt_state, params)
    return (
      optax.apply_updates(params, updates),
      batch_stats,
      opt_state,
      loss,
      weight_decay * sum(jax.tree.leaves(squares)),
      total_gradient,
    )

  opt_state = make.init(params)
  places = [tf_deeplab.rename(str(name))[1] for name in z["grad_names"]]
  # Stated noise of the norms: median 6e-5, 9e-4, 2e-3. Single entries and maxima flip with single ReLUs.
  noise = {0: 6e-5, 1: 9e-4, 2: 2e-3}
  for k in range(3):
    shape = tuple(z[f"step{k}/dropout_mask_shape"])
    mask = np.unpackbits(z[f"step{k}/dropout_keep_mask"])[: np.prod(shape)].reshape(shape).astype(np.float32)
    before = params
    with jax.default_matmul_precision("highest"):
      params, batch_stats, opt_state, loss, decay, gradient = step_fn(params, batch_stats, opt_state, mask)
    np.testing.assert_allclose(loss, z[f"step{k}/data_loss"], rtol=1e-5)
    np.testing.assert_allclose(decay, z[f"step{k}/reg_loss"], rtol=1e-5)
    np.testing.assert_allclose(loss + decay, z[f"step{k}/total_loss"], rtol=1e-5)
    np.testing.assert_allclose(schedule(k), z[f"step{k}/lr"], rtol=1e-6)
    delta = jax.tree.map(lambda new, old: new - old, params, before)
    before_flat = traverse_util.flatten_dict(before, sep="/")
    for what, tree in (("grad_summary", gradient), ("var_delta_summary", delta)):
      flat = traverse_util.flatten_dict(tree, sep="/")
      error = []
      for place, want in zip(places, z[f"step{k}/{what}"]):
        array = np.asarray(flat[place], np.float64)
        array = np.swapaxes(array, 2, 3).reshape(-1) if place.endswith("depthwise_kernel") else array.reshape(-1)
        got = np.array([np.linalg.norm(array), array.sum(), abs(array).max(), *array[:6]])[: len(want)]
        scale = np.array([want[0], want[0] * np.sqrt(array.size), want[2], *[want[2]] * 6])
        # A difference of weights has their rounding error.
        weight = np.abs(np.asarray(before_flat[place])).max() if what == "var_delta_summary" else 0
        slack = 2.0**-23 * weight * np.array([np.sqrt(array.size), array.size, *[1] * 7])
        error.append(np.maximum(abs(got - want) - slack, 0) / scale)
      median, largest = np.median(error, axis=0), np.max(error, axis=0)
      assert median[0] < 2 * noise[k] and largest[0] < 40 * noise[k], (k, what, median, largest)
      assert (median < 10 * noise[k]).all() and (largest < 150 * noise[k]).all(), (k, what, median, largest)
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), batch_stats, initial_stats))
