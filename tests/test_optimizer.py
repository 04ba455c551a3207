"""Schedules and optimisers, against numbers that PyTorch produced."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from segjax import models, optimizer, state

DATA = pathlib.Path(__file__).parent / "data"


def schedule(name, **options):
  defaults = dict(base_lr=0.01, num_steps=100, poly_power=0.9, warmup_steps=0, end_lr=0.0)
  return optimizer.make_schedule(name, **{**defaults, **options})


def run(name, lr=0.01, **options):
  z = np.load(DATA / "torch_optim_bn.npz")
  defaults = dict(momentum=0.9, nesterov=False, weight_decay=0.0, clip_norm=0.0)
  make = optimizer.make_optimizer(name, lr if callable(lr) else lambda _: lr, **{**defaults, **options})
  params = {"kernel": jnp.asarray(z["param0"])}
  opt_state, trail = make.init(params), []
  for gradient in z["grads"]:
    updates, opt_state = make.update({"kernel": jnp.asarray(gradient)}, opt_state, params)
    params = optax.apply_updates(params, updates)
    trail.append(params["kernel"])
  return np.stack(trail), z


@pytest.mark.parametrize("name, theirs", [("poly", "torchvision_ref_poly"), ("cosine", "torch_cosine")])
def test_schedule_equals_torch_at_every_step(name, theirs):
  want = np.load(DATA / "torch_schedules.npz")[theirs][:, 1]
  np.testing.assert_allclose([schedule(name)(i) for i in range(101)], want, rtol=2e-5, atol=1e-9)


def test_poly_after_warm_up_spans_the_remaining_steps_as_in_torchvision():
  want = np.load(DATA / "torch_schedules.npz")["torchvision_ref_warmup10_poly"][10:, 1]
  got = [schedule("poly", warmup_steps=10)(i) for i in range(10, 101)]
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-9)


def test_warm_up_is_linear_from_zero_and_the_last_value_stays():
  rate = schedule("constant", warmup_steps=4)
  np.testing.assert_allclose([rate(i) for i in (0, 1, 2, 4, 99, 200)], [0, 0.0025, 0.005, 0.01, 0.01, 0.01], rtol=1e-6)
  assert schedule("poly", end_lr=0.002)(500) == np.float32(0.002)


@pytest.mark.parametrize("name", ["poly", "cosine", "step", "constant"])
@pytest.mark.parametrize("warmup, first", [("linear", [1e-3, 4e-3, 7e-3]), ("constant", [1e-3] * 3), ("linear", [])])
def test_schedules_start_after_any_warm_up_and_end_at_end_lr(name, warmup, first):
  """Against the formulas of make_schedule's docstring in double precision, compiled as in the optimiser."""
  warm = len(first)
  n = np.minimum(np.arange(60), 40)
  want = {
    "poly": 1e-3 + 9e-3 * (1 - n / 40) ** 0.9,
    "cosine": 1e-3 + 9e-3 * (1 + np.cos(np.pi * n / 40)) / 2,
    "step": np.maximum(1e-2 * 0.3 ** (np.arange(60) // 7), 1e-3),
    "constant": np.full(60, 1e-2),
  }[name]
  options = dict(warmup_steps=warm, warmup_lr=1e-3, warmup=warmup, decay_every=7, decay_factor=0.3)
  rate = schedule(name, num_steps=40 + warm, end_lr=1e-3, **options)
  got = jax.vmap(rate)(jnp.arange(warm + 60))
  np.testing.assert_allclose(got, [*first, *want], rtol=2e-6)


@pytest.mark.parametrize(
  "theirs, name, options",
  [
    ("sgd_m0.9_wd1e-4_lr0.01", "sgd", dict(weight_decay=1e-4)),
    ("sgd_m0.9_wd1e-2_lr0.01", "sgd", dict(weight_decay=1e-2)),
    ("sgd_nesterov_m0.9_wd1e-2_lr0.01", "sgd", dict(weight_decay=1e-2, nesterov=True)),
    ("sgd_m0.9_clip1", "sgd", dict(clip_norm=1.0)),
    ("adamw_lr1e-3_wd1e-2", "adamw", dict(lr=1e-3, weight_decay=1e-2)),
  ],
)
def test_optimizer_equals_torch_for_eight_steps(theirs, name, options):
  got, z = run(name, **options)
  np.testing.assert_allclose(got, z[theirs], rtol=2e-5, atol=1e-6)


def test_weight_decay_touches_kernels_and_nothing_else():
  """The rule, over every parameter path of every model."""
  for name in models.MODELS:
    model = nnx.eval_shape(lambda name=name: models.build(name, num_classes=3, rngs=nnx.Rngs(0)))
    _, params, _ = state.split(model)
    mask = traverse_util.flatten_dict(optimizer.decay_mask(params))
    shapes = traverse_util.flatten_dict(params)
    for path, decays in mask.items():
      dense = shapes[path].ndim == 4 and shapes[path].shape[2] > 1  # A depthwise kernel is [3, 3, 1, C].
      assert decays == (path[-1] == "kernel") == dense, path
      assert path[-1] in ("kernel", "depthwise_kernel", "bias", "scale"), path


@pytest.mark.full
def test_the_head_is_all_that_is_not_backbone_in_every_model_that_has_one():
  """So also the score and upscore layers of an FCN, which no ImageNet weights begin."""
  names = {}
  for name in models.MODELS:
    model = nnx.eval_shape(lambda name=name: models.build(name, num_classes=3, rngs=nnx.Rngs(0)))
    _, params, _ = state.split(model)
    names[name] = params.keys()
    if "backbone" in params:
      found = traverse_util.flatten_dict(optimizer.lr_factors(("!backbone:10",), params))
      assert {path[0] for path, m in found.items() if m == 1} == {"backbone"}, name
      assert all(m == 10 for path, m in found.items() if path[0] != "backbone")
  assert {"score_fc7", "score_pool4", "upscore"} <= names["fcn"]


def test_parameters_outside_the_mask_do_not_move_without_gradient():
  make = optimizer.make_optimizer("sgd", lambda _: 0.1, momentum=0.9, nesterov=False, weight_decay=0.1, clip_norm=0)
  params = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
  updates, _ = make.update(jax.tree.map(jnp.zeros_like, params), make.init(params), params)
  assert (updates["a"]["bias"] == 0).all() and (updates["a"]["kernel"] != 0).all()


def test_unknown_names_list_the_known_ones():
  with pytest.raises(ValueError, match="poly, cosine, step, constant"):
    schedule("exponential")
  with pytest.raises(ValueError, match="sgd or adamw"):
    run("lamb")
