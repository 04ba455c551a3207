"""Freezing and learning-rate multipliers, by patterns over the paths of parameters."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from segjax import models, optimizer, sharding, state, steps
from segjax import train as train_lib
from segjax.config import ConfigError, patterns
from segjax.config import rules as config_rules
from segjax.experiment import Experiment
from segjax.pretrained import merge_variables
from segjax.run.checkpoint import Checkpoints
from segjax.tools import flops
from tests.experiment import host_batches, make_step, mesh_of
from tests.test_config_rules import UNET, make
from tests.test_memory import assert_close, bytes_on_first_device, changed, deeplab, run_in_float64
from tests.test_train import checkpoint


@pytest.fixture
def config(tiny_config):
  """A U-Net of one level, without batch norm and dropout, so that the parts of a batch add up to it."""
  tiny_config.model.update(depth=1, batch_norm=False, dropout=0.0)
  tiny_config.optimizer.update(weight_decay=0.1)
  return tiny_config


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def same(first, second):
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def parameters():
  """{model: its parameters' shapes and its statistics'}."""
  found = {}
  for name in models.MODELS:
    network = nnx.eval_shape(lambda name=name: models.build(name, num_classes=3, rngs=nnx.Rngs(0)))
    found[name] = state.split(network)[1:]
  return found


def test_a_pattern_names_what_lies_at_or_below_it_in_every_model(parameters):
  for params, _ in parameters.values():
    paths = flat(params).keys()
    for path in paths:
      parts = path.split("/")
      assert patterns.match(path, paths) == {path} == paths - patterns.match(f"!{path}", paths)
      for n in range(1, len(parts)):
        first = "/".join(parts[:n])
        assert patterns.match(first, paths) == {p for p in paths if p.split("/")[:n] == parts[:n]}
      assert path in patterns.match(f"*/{parts[-1]}", paths)
      for other in (path[:-1], f"{path}/kernel", path[1:], f"!{path}x", path.upper()):
        assert patterns.match(other, paths) == set()
    assert patterns.match("*/bias", paths) == {path for path in paths if path.endswith("/bias")}


def test_statistics_are_frozen_exactly_where_scale_and_bias_are_in_every_model(parameters):
  for params, batch_stats in parameters.values():
    for path in flat(params):
      if path.endswith("/scale"):
        norm = path.removesuffix("scale")
        both = optimizer.frozen_paths([path, f"{norm}bias"], params, batch_stats)
        assert both == {f"{norm}{leaf}" for leaf in ("scale", "bias", "mean", "var")}
        assert optimizer.frozen_paths([path], params, batch_stats) == {path}
    kernels = optimizer.frozen_paths(["*kernel"], params, batch_stats)
    assert not kernels & flat(batch_stats).keys() and not kernels >= flat(params).keys()
    assert not optimizer.frozen_paths([], params, batch_stats)


@pytest.mark.parametrize(
  "field, value, message",
  [
    (
      "freeze",
      ("down0", "backbone"),
      r"optimizer.freeze: no parameter matches 'backbone'\. .*down0, .*down0/conv1/kernel",
    ),
    ("freeze", ("!encoder",), "optimizer.freeze: no parameter matches '!encoder'"),
    ("freeze", ("down0/conv",), "no parameter matches 'down0/conv'"),
    ("freeze", ("*",), r"optimizer.freeze = \('\*',\): freezes all 16 parameters"),
    ("freeze", ("logits", "!logits"), "freezes all 16 parameters"),
    ("lr_multipliers", ("head:10",), "optimizer.lr_multipliers: no trained parameter matches 'head'"),
    ("lr_multipliers", ("logits:-1",), "'logits:-1' must be .* finite factor above 0"),
  ],
)
def test_patterns_that_cannot_act_are_refused_before_anything_is_built(config, field, value, message):
  config.optimizer[field] = value
  with pytest.raises(ConfigError, match=message):
    train_lib.build_model(Experiment(config))


def test_a_multiplier_of_frozen_parameters_alone_is_refused(config):
  config.optimizer.freeze, config.optimizer.lr_multipliers = ("logits",), ("logits:2",)
  with pytest.raises(ConfigError, match="no trained parameter matches 'logits'"):
    _ = Experiment(config).abstract_state


@pytest.mark.parametrize("value", ["logits", "logits:", ":2", "logits:-1", "logits:0", "logits:nan", "logits:inf", 3])
def test_a_multiplier_needs_a_pattern_and_a_finite_factor_above_0(value):
  with pytest.raises(ConfigError, match="optimizer.lr_multipliers = .* must be .*PATTERN:FACTOR"):
    config_rules.validate(make(UNET, {"optimizer.lr_multipliers": ("up0:2", value)}))
  config_rules.validate(make(UNET, {"optimizer.lr_multipliers": ("up0:2", "*/bias:1e-3")}))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_multipliers_scale_the_learning_rate_and_those_of_all_patterns_multiply(name):
  """Against runs that have that rate for everything."""
  params = {"a": {"kernel": jnp.asarray([1.0, -2.0])}, "b": {"kernel": jnp.asarray([0.5]), "bias": jnp.asarray([3.0])}}

  def run(rate, multipliers=()):
    make = optimizer.make_optimizer(name, lambda _: rate, weight_decay=0.1, lr_multipliers=multipliers)
    current, opt_state = params, make.init(params)
    for n in range(4):
      gradient = jax.tree.map(jnp.square, optax.tree.scale(n + 1.0, params))
      updates, opt_state = make.update(gradient, opt_state, current)
      current = optax.apply_updates(current, updates)
    return flat(current)

  got = run(0.01, ("b:10", "*bias:0.5", "!a:0.1"))
  for path, rate in {"a/kernel": 0.01, "b/kernel": 0.01, "b/bias": 0.005}.items():
    np.testing.assert_allclose(got[path], run(rate)[path], rtol=1e-6)
  assert not np.allclose(got["b/bias"], run(0.01)["b/bias"], rtol=1e-3)


@pytest.mark.parametrize("name", ["deeplab_voc", "fcn8_voc"])
def test_the_recipes_double_the_rates_of_biases_of_convolutions_alone(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  params = Experiment(config, num_classes=21).abstract_state.params
  factors = flat(optimizer.lr_factors(config.optimizer.lr_multipliers, params))
  paths = factors.keys()
  norms = {path.replace("/scale", "/bias") for path in paths if path.endswith("/scale")}
  assert {p for p, factor in factors.items() if factor == 2} == {p for p in paths if p.endswith("/bias")} - norms
  assert set(factors.values()) == {1, 2}


def one_step(config, **fields):
  """The state before and after one step on one device, and its metrics."""
  config = changed(config)
  config.optimizer.update(fields)
  mesh = mesh_of(1)
  step, current = make_step(config, mesh)
  before = jax.device_get(current)
  batch = next(sharding.to_device(iter(host_batches(config, 1)), mesh))
  after, metrics = step(current, batch)
  return before, jax.device_get(after), jax.device_get(metrics)


@pytest.mark.full
def test_frozen_parts_stay_bit_for_bit_and_the_others_train_as_if_all_were(config):
  """Without batch norm the gradient with respect to the others is the same."""
  _, whole, _ = one_step(config)
  before, after, metrics = one_step(config, freeze=("down0", "*/bias"))
  start, end, want = flat(before.params), flat(after.params), flat(whole.params)
  frozen = {path for path in start if path.startswith("down0/") or path.endswith("/bias")}
  for path in start:
    assert (start[path] == end[path]).all() == (path in frozen), path
    if path not in frozen:
      np.testing.assert_allclose(end[path], want[path], rtol=1e-5, atol=1e-7)
  assert flat(after.ema["params"]).keys() == start.keys() - frozen
  averages = flat(after.eval_variables()["params"])
  assert averages.keys() == start.keys() and all((averages[path] == start[path]).all() for path in frozen)
  # A step of the raw gradient, which is that clipped at its own norm.
  _, clipped, _ = one_step(config, freeze=("down0", "*/bias"), clip_norm=float(metrics["grad_norm"]) * (1 + 1e-5))
  assert_close(clipped.params, after.params, 1e-6)


@pytest.mark.full
def test_batch_norms_of_a_frozen_backbone_keep_their_statistics_and_use_them(config):
  config = deeplab(config)
  before, after, _ = one_step(config, freeze=("backbone",), ema_decay=0.9)
  same(before.params["backbone"], after.params["backbone"])
  same(before.batch_stats["backbone"], after.batch_stats["backbone"])
  others = {name: tree for name, tree in flat(before.batch_stats).items() if not name.startswith("backbone/")}
  assert others and all((flat(after.batch_stats)[name] != x).any() for name, x in others.items())
  # One whose bias alone is frozen goes by the batch.
  biases = Experiment(changed(config, optimizer=dict(freeze=("*/bias",)))).network
  assert not any(m.frozen for _, m in nnx.iter_modules(biases) if hasattr(m, "frozen"))
  frozen = Experiment(changed(config, optimizer=dict(freeze=("backbone",)))).network
  norms = {"/".join(map(str, path)): m.frozen for path, m in nnx.iter_modules(frozen) if hasattr(m, "frozen")}
  assert {name for name, is_frozen in norms.items() if is_frozen} == {n for n in norms if n.startswith("backbone/")}


def costs(config, freeze):
  """Multiply-adds of a step and of the model's forward pass, and the abstract state."""
  made = Experiment(changed(config, kernels="plain", optimizer=dict(freeze=freeze)), mesh=mesh_of(1))
  image = jax.ShapeDtypeStruct((config.batch_size, *config.crop_size, 3), jnp.float32)
  variables = made.abstract_state.variables()
  forward = flops.multiply_adds(lambda v, x: steps.merge(made.graphdef, v)(x), variables, image)
  step = flops.multiply_adds(made.make_train_step(), *made.abstract_train_arguments((24, 32)))
  return step, forward, made.abstract_state


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_frozen_parts_cost_no_gradient_and_no_state(config):
  config.model.batch_norm = True
  whole, forward, _ = costs(config, ())
  partly, _, current = costs(config, ("!logits",))
  pixels, width = config.batch_size * 16 * 24, config.model.width
  assert whole == 3 * forward - pixels * 9 * 3 * width  # No gradient with respect to the image.
  assert partly == forward + pixels * width * 6  # With respect to the kernel of the classifier, and no feature map.
  assert size(current.opt_state) == size(current.params["logits"]) + 1  # Momentum, and a count.
  assert jax.tree.structure(current.ema) == jax.tree.structure(
    dict(params=dict(logits=current.params["logits"]), batch_stats={})
  )
  assert size(current.batch_stats) > 0


@pytest.mark.full
def test_a_frozen_backbone_has_no_backward_pass(config):
  """With depthwise convolutions and batch norms, whose gradients are our own."""
  config = deeplab(config)
  step, forward, current = costs(config, ("backbone",))
  network, image = (
    Experiment(config).graphdef,
    jax.ShapeDtypeStruct((config.batch_size, *config.crop_size, 3), jnp.float32),
  )
  run = lambda v, x: steps.merge(network, v).backbone(x, False, {})  # noqa: E731
  head = forward - flops.multiply_adds(run, current.variables(), image)
  assert forward < step <= forward + 2 * head < 3 * forward
  of_head = size({name: x for name, x in current.params.items() if name != "backbone"})
  assert size(current.opt_state) == of_head + 1 and size(current.ema["params"]) == of_head
  assert "backbone" not in current.ema["batch_stats"] and "backbone" in current.batch_stats


@pytest.mark.full
@pytest.mark.parametrize(
  "data, fields", [(1, dict(accumulate_steps=2)), (8, dict(shard_state=True)), (1, dict(remat=True))]
)
def test_what_saves_memory_changes_no_update_of_a_run_with_frozen_parts(config, data, fields):
  config.model.width = 16
  config.optimizer.freeze = ("down0", "*/bias")
  want = run_in_float64(changed(config), 1, 1, num_steps=2)
  assert_close(run_in_float64(changed(config, **fields), data, 1, num_steps=2), want)


def test_a_state_with_frozen_parts_is_saved_and_restored_bit_for_bit_also_as_initial_weights(config, tmp_path):
  config.optimizer.freeze = ("!logits",)
  experiment = Experiment(config, mesh=mesh_of(1))
  current = experiment.init_state()
  current.ema = jax.tree.map(lambda x: x + 1, current.ema)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(current)
    checkpoints.wait()
    again = checkpoints.restore(experiment.abstract_state, 0)
    variables = checkpoints.restore_variables(0)
  same(jax.device_get(current), jax.device_get(again))
  same(jax.device_get(current.eval_variables()["params"]), variables["params"])
  assert bytes_on_first_device(current.opt_state) < bytes_on_first_device(current.params["logits"]) + 100


@pytest.mark.full
def test_a_run_with_frozen_parts_resumes_bit_for_bit(config, tmp_path, capsys):
  config.optimizer.update(freeze=("down0",), lr_multipliers=("logits:2",), schedule="constant", clip_norm=1.0)
  config.num_steps = 6
  train_lib.train(config, tmp_path / "whole")
  assert "frozen" in capsys.readouterr().out
  train_lib.train(changed(config, num_steps=3), tmp_path / "parts")
  train_lib.train(config, tmp_path / "parts")
  same(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "parts", 6))
  config.optimizer.freeze = ()
  with pytest.raises(ConfigError, match="optimizer.freeze: "):
    train_lib.train(config, tmp_path / "parts")
  config.init.path = str(tmp_path / "whole")
  train_lib.train(config, tmp_path / "all")  # The second phase of a transfer: all of it.
  assert "init: imported 16 of 16 tensors" in capsys.readouterr().out


def test_patterns_name_what_a_warm_start_leaves_out():
  ours = {"params": {"backbone": {"kernel": np.zeros(2)}, "head": {"kernel": np.zeros(2), "bias": np.zeros(2)}}}
  theirs = {"params": {"backbone": {"kernel": np.ones(2)}}}
  for exclude in (("!backbone",), ("head",), ("*/bias", "head/kernel")):
    merged, taken, count = merge_variables(ours, theirs, exclude, "there")
    assert (taken, count) == (1, 3) and merged["params"]["backbone"]["kernel"].all()
  with pytest.raises(ConfigError, match=r"(?s)matches '!encoder'.*only in the model: params/head/bias"):
    merge_variables(ours, theirs, ("!encoder",), "there")
