"""Batch norm's statistics on every mesh, in few collectives, and of one value of each channel: refused before training."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import kernels, sharding, train
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.kernels import batch_norm
from segjax.tools import dry_run, hlo
from tests.experiment import mesh_of
from tests.marks import full

PLATFORMS = ["gpu", "tpu", "cpu", "split_gpu", "plain"]


def normalise(x, platform, data=1, space=1):
  """(y, mean, variance) of a batch norm with ReLU, and its gradients for the cotangent x, all as compiled for a mesh.

  Returns:
    ((y, mean, variance, gradients of x, scale and bias), the compiled text).
  """
  mesh = mesh_of(data, space)
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  scale, bias = jnp.full((1, 1, 1, x.shape[-1]), 2, dtype), jnp.full((1, 1, 1, x.shape[-1]), 0.5, dtype)

  @jax.jit
  @sharding.on(mesh)
  @kernels.on(platform)
  def both(x, scale, bias):
    x = sharding.split_height(x)
    run = lambda *arguments: batch_norm.by_batch_statistics(*arguments, 1e-5, jax.nn.relu)  # noqa: E731
    (y, mean, var), pull = jax.vjp(run, x, scale, bias)
    return y, mean, var, *pull((x.astype(y.dtype), jnp.zeros_like(mean), jnp.zeros_like(var)))

  x = jax.device_put(x, sharding.batch_sharding(mesh))
  compiled = both.lower(x, *jax.device_put((scale, bias), sharding.replicated(mesh))).compile()
  return jax.device_get(compiled(x, scale, bias)), compiled.as_text()


@pytest.mark.parametrize("platform", ["gpu", "cpu", *full("tpu", "split_gpu", "plain")])
def test_any_mesh_has_the_same_statistics_and_gradients_in_float64(platform):
  with jax.enable_x64(True):
    for rows in (8, 5):  # Of which each part of the height has as many, or not.
      x = np.random.default_rng(0).normal(size=(8, rows, 6, 3)) + [0, 5, 1000]
      want, _ = normalise(x, "plain")
      np.testing.assert_allclose(want[1], x.mean((0, 1, 2), keepdims=True), rtol=1e-12)
      np.testing.assert_allclose(want[2], x.var((0, 1, 2), keepdims=True), rtol=1e-9)
      for data, space in ((1, 1), (8, 1), (4, 2), (2, 4)):
        found, _ = normalise(x, platform, data, space)
        for a, b in zip(found, want):
          np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("data, space", [(1, 1), (8, 1), (4, 2)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_no_digits_are_lost_where_the_mean_is_a_thousand_deviations(platform, data, space):
  """In float32, where the mean of an example, 1000, is known to 3e-5; E[x^2] - E[x]^2 would be off by several per cent."""
  rng = np.random.default_rng(0)
  x = (1000 + rng.normal(size=(8, 16, 16, 64)) + rng.normal(size=(8, 1, 1, 64))).astype(np.float32)
  (_, mean, var, *_), _ = normalise(x, platform, data, space)
  exact = x.astype(np.float64)
  np.testing.assert_allclose(mean, exact.mean((0, 1, 2), keepdims=True), rtol=1e-6)
  np.testing.assert_allclose(var, exact.var((0, 1, 2), keepdims=True), rtol=1e-4)


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_statistics_take_one_collective_and_gradients_another(platform):
  _, text = normalise(np.ones((8, 8, 6, 3), np.float32), platform, data=8)
  found = {kind: sizes for kind, sizes in hlo.collectives(text).items() if sizes}
  # Mean and variance of each device's part, and the sums for scale and bias.
  assert found == {"all-gather": [8 * 2 * 3 * 4], "all-reduce": [2 * 3 * 4]}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_result_and_cotangent_are_of_the_type_of_x_with_the_bits_of_float32_rounded(platform):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.bfloat16)
  found, _ = normalise(x, platform)
  assert [part.dtype for part in found] == [x.dtype, *["float32"] * 2, x.dtype, *["float32"] * 2]
  want, _ = normalise(x.astype(jnp.float32), platform)
  for a, b in zip(found, want):
    if platform == "plain":  # Autodiff's gradient of the statistics is rounded in passing.
      np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=0.02, atol=0.02)
    else:
      np.testing.assert_array_equal(a, b.astype(a.dtype))


def refusal(model, batch_size, accumulate_steps=1, crop_size=(64, 64), **options):
  """What `Experiment.check` says of a config; "" for nothing."""
  config = default_config(model=model, data="synthetic")
  config.batch_size, config.accumulate_steps, config.crop_size = batch_size, accumulate_steps, crop_size
  config.model.update(options)
  try:
    Experiment(config).check()
  except ConfigError as error:
    return str(error)
  return ""


DEEPLAB = dict(model="deeplab_v3plus", backbone="mobilenet_v2")
UNET = dict(model="unet", width=2)


@pytest.mark.parametrize(
  "options, remedy",
  [
    (dict(batch_size=1, **DEEPLAB), "at least 2, or set model.frozen_bn = True or model.image_pooling = False"),
    (dict(batch_size=4, accumulate_steps=4, **DEEPLAB), "batch_size = 4 with accumulate_steps = 4 .* at least 8"),
    (dict(batch_size=1, crop_size=(32, 32), model="dilated_fcn", output_stride=32), "or set model.frozen_bn = True."),
    (dict(batch_size=1, crop_size=(16, 16), **UNET), "or set model.batch_norm = False."),
  ],
)
def test_one_value_of_each_channel_is_refused_with_the_remedies_of_the_model(options, remedy):
  assert re.search(remedy, refusal(**options))


@pytest.mark.parametrize(
  "options",
  [
    dict(batch_size=2, **DEEPLAB),
    dict(batch_size=8, accumulate_steps=4, **DEEPLAB),
    dict(batch_size=1, frozen_bn=True, **DEEPLAB),
    dict(batch_size=1, image_pooling=False, **DEEPLAB),
    dict(batch_size=1, crop_size=(32, 32), **UNET),
    dict(batch_size=1, crop_size=(16, 16), batch_norm=False, **UNET),
    dict(batch_size=1, model="fcn", width=2),
  ],
)
def test_more_values_or_none_of_the_batch_are_not_refused(options):
  assert refusal(**options) == ""


@pytest.mark.parametrize("accumulate_steps", [1, *full(4)])
def test_training_and_a_dry_run_refuse_it_before_the_workdir_is_made(tmp_path, accumulate_steps):
  config = default_config(model="deeplab_v3plus", data="synthetic")
  config.model.backbone, config.crop_size = "mobilenet_v2", (32, 32)
  config.batch_size, config.accumulate_steps, config.mesh.data = accumulate_steps, accumulate_steps, 1
  config.data.update(image_size=(32, 32), num_train=4, num_val=2, loader="grain", workers=1)
  for command in (train.train, dry_run.dry_run):
    with pytest.raises(ConfigError, match="one image at a time"):
      command(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
