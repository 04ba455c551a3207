"""Kernels by platform: those of XLA:CPU reach no other, and all compute what the plain ones do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels_in_steps
from segjax import kernels
from segjax.config import default_config
from segjax.experiment import Experiment
from tests import experiment
from tests.marks import full

# At full width, where each of XLA:CPU's forms applies somewhere: nothing is compiled.
NETWORKS = {
  "unet": dict(name="unet", depth=2),
  "published_unet": dict(name="unet", depth=1, padding="valid", batch_norm=False),
  "fcn": dict(name="fcn"),
  "fcn_of_features": dict(name="fcn", fuse="features"),
  "mobilenet": dict(name="deeplab_v3plus", backbone="mobilenet_v2"),
  "xception": dict(name="deeplab_v3plus", backbone="xception_41"),
  "dense": dict(name="deeplab_v3plus", backbone="resnet_50", separable=False, frozen_bn=True),
  "dilated_fcn": dict(name="dilated_fcn", auxiliary=True),
}


def lowered(network, kind, platform, **fields):
  """StableHLO of a step made for `platform`, under a config with these fields."""
  options = dict(NETWORKS[network])
  config = default_config(model=options.pop("name"), data="synthetic")
  config.model.update(options)
  config.batch_size, config.crop_size, config.kernels = 2, (32, 32), platform
  config.eval.batch_size = 2
  config.update(fields)
  made = Experiment(config, mesh=experiment.mesh_of(1), num_classes=3)
  if kind == "train":
    traced = made.make_train_step().trace(*made.abstract_train_arguments((32, 32)))
  else:
    traced = made.eval_step.trace(*made.abstract_eval_arguments((32, 32)))
  return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,)).as_text()


def tuned_for_cpu(text: str) -> set[str]:
  """Which of the forms that are fast on XLA:CPU alone are in a program."""
  found = {"barrier"} if "optimization_barrier" in text else set()
  shapes = [
    [shape.split("x")[:-1] for shape in re.findall(r"tensor<([\w]+)>", line)]
    for line in text.splitlines()
    if "stablehlo.dot_general" in line
  ]
  if any(len(left) == len(right) == 2 for left, right, *_ in shapes):
    found.add("flat product")
  one_row = re.search(r"stablehlo.convolution.*, tensor<1x3x\d+x\d+xf32>\) ->", text)  # Of a 3x3 kernel.
  return found | {"winograd"} if one_row else found


@pytest.mark.parametrize(
  "network", [full(name)[0] if name in ("xception", "mobilenet", "dense", "dilated_fcn") else name for name in NETWORKS]
)
def test_nothing_tuned_for_cpu_is_in_a_step_for_gpu_or_tpu(network):
  for kind in ("train", "eval"):
    for platform in ("gpu", "tpu"):
      assert tuned_for_cpu(lowered(network, kind, platform)) == set(), (kind, platform)


@pytest.mark.parametrize("network", ["unet", *full("fcn_of_features", "xception")])
def test_one_option_has_every_product_of_a_step_in_float32_at_highest_precision(network):
  for kind in ("train", "eval"):
    for platform in ("gpu", "tpu"):
      text = lowered(network, kind, platform, matmul_precision="highest")
      products = [line for line in text.splitlines() if re.search(r"stablehlo\.(convolution|dot_general)\b", line)]
      assert products and all(line.count("HIGHEST") == 2 for line in products), (kind, platform)


def test_what_is_tuned_for_cpu_would_be_found():
  assert tuned_for_cpu(lowered("unet", "train", "cpu")) == {"barrier", "flat product", "winograd"}


@pytest.mark.parametrize("model", ["shallow_unet", *full("published_unet", "fcn", "deeplab", "dilated_fcn")])
def test_a_step_of_training_is_the_same_with_plain_kernels(model, monkeypatch):
  """Loss, gradient, parameters after it and statistics, in float64."""
  experiment.shorten_backbones(monkeypatch)
  config = experiment.make_config("deeplab" if model == "dilated_fcn" else model)
  if model == "dilated_fcn":
    config = default_config(model=model, data="synthetic")
    config.crop_size, config.dtype = (32, 32), "float64"
    config.data.update(image_size=(22, 32), num_train=20, loader="grain", workers=1)
    config.model.update(output_stride=16, auxiliary=True)
    config.augment.scale = (1.0, 1.0)  # Exact: fifty batch norms amplify the rounding of an image in float32.
  if model in ("deeplab", "dilated_fcn"):
    config.batch_size = 4
  mesh, results = experiment.mesh_of(1), []
  with jax.enable_x64(True):
    (batch,) = experiment.host_batches(config, 1)
    initial = Experiment(config, mesh=mesh).init_state()
    for config.kernels in ("auto", "plain"):
      step = Experiment(config, mesh=mesh).make_train_step()
      compiled = step.lower(initial, batch).compile({"xla_backend_optimization_level": 0})
      after, metrics = compiled(jax.tree.map(jnp.copy, initial), batch)  # Which is donated.
      results.append(jax.device_get((metrics, after.params, after.batch_stats)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), *results)


def test_a_mesh_takes_the_kernels_of_its_devices_unless_it_is_told_others():
  assert kernels.target(experiment.mesh_of(8), "auto") == "cpu"
  assert kernels.target(experiment.mesh_of(4, 2), "auto") == "split_cpu"
  assert kernels.target(experiment.mesh_of(8), "plain") == "plain"
  assert kernels.target(experiment.mesh_of(8), "tpu") == "tpu"


def test_a_function_traced_for_one_platform_is_not_taken_for_another():
  @jax.jit
  def which(x):
    return kernels.fastest(lambda: x, cpu=lambda: x + 1)()

  assert which(0) == 0
  with kernels.on("cpu"):
    assert which(0) == 1
  assert which(0) == 0


def test_what_the_benchmark_of_steps_takes_out_exists():
  assert all(hasattr(module, name) for module, name, _ in kernels_in_steps.WITHOUT.values())
