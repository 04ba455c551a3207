"""Compute in bfloat16: no reduction over many elements is computed in it, forward or backward."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import models
from segjax.experiment import Experiment
from tests import experiment, test_kernels
from tests.marks import full

NETWORKS = {
  "unet": dict(name="unet", width=4, depth=2),
  "published_unet": dict(name="unet", width=4, depth=2, padding="valid", batch_norm=False),
  "bilinear_unet": dict(name="unet", width=4, depth=2, up="bilinear", batch_norm=False),
  "fcn": dict(name="fcn", width=2, fuse="features"),
  "fixed_fcn": dict(name="fcn", width=2, upsampling="fixed"),
  "mobilenet": dict(name="deeplab_v3plus", backbone="mobilenet_v2", atrous_rates=(1, 2)),
  "xception": dict(name="deeplab_v3plus", backbone="xception_41", output_stride=32, frozen_bn=True),
  "dense": dict(name="deeplab_v3plus", backbone="resnet_50", separable=False, auxiliary=True, decoder=False),
  "dilated_fcn": dict(name="dilated_fcn", auxiliary=True),
}


UNOPTIMISED = {"xla_backend_optimization_level": 0}  # Compiled sooner.


def gradient(network, dtype, size=64):
  """(function, arguments): the gradient of a cross-entropy with respect to all parameters, and how these begin."""
  build = lambda: models.build(num_classes=3, dtype=dtype, rngs=nnx.Rngs(0), **NETWORKS[network])  # noqa: E731

  @jax.jit
  def init():
    return nnx.state(build())

  graphdef = nnx.graphdef(nnx.eval_shape(build))
  rng = np.random.default_rng(0)
  image = rng.uniform(0, 255, (2, size, size, 3)).astype(np.float32)

  def loss(params, others, image):
    model, endpoints = nnx.merge(graphdef, params, others, copy=True), {}
    logits = model(model.preprocess(image), train=True, endpoints=endpoints)
    scores = [logits, endpoints["auxiliary"]] if "auxiliary" in endpoints else [logits]
    return -sum(jax.nn.log_softmax(x)[..., 0].mean() for x in scores)

  return jax.grad(loss), (*jax.eval_shape(init).split(nnx.Param, ...), image), init


@contextlib.contextmanager
def reductions_in_16_bits_refused():
  before = jax.config.jax_allow_f16_reductions
  jax.config.update("jax_allow_f16_reductions", False)
  try:
    yield
  finally:
    jax.config.update("jax_allow_f16_reductions", before)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_model_reduces_in_bfloat16(network):
  function, arguments, _ = gradient(network, "bfloat16")
  with reductions_in_16_bits_refused():
    jax.eval_shape(function, *arguments)


@pytest.mark.parametrize("model", ["published_unet", *full("deeplab")])
def test_no_train_step_reduces_in_bfloat16(model):
  made = Experiment(experiment.make_config(model, "bfloat16"), mesh=experiment.mesh_of(1))
  with reductions_in_16_bits_refused():
    jax.eval_shape(made.make_train_step(), *made.abstract_train_arguments((22, 32)))


def sums_in_bfloat16(text: str) -> list[str]:
  """The reductions of a lowered program that add up bfloat16; those of convolutions and matmuls are float32 in hardware."""
  adding = (
    r"applies stablehlo.add .*xbf16>|stablehlo.add %\S+, %\S+ : tensor<bf16>"  # The second in a reduction's body.
  )
  return [line.strip() for line in text.splitlines() if re.search(adding, line)]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("network", ["unet", *full(*(name for name in test_kernels.NETWORKS if name != "unet"))])
def test_no_step_for_gpu_or_tpu_sums_in_bfloat16(network, platform):
  for kind in ("train", "eval"):
    assert sums_in_bfloat16(test_kernels.lowered(network, kind, platform, dtype="bfloat16")) == []


@pytest.mark.parametrize(
  "function",
  [
    lambda x: jax.lax.reduce_sum(x, axes=(0,)),
    lambda x: jax.lax.reduce_window(x, jnp.zeros((), x.dtype), jax.lax.add, (2, 2), (2, 2), "VALID"),
    lambda x: x.at[0].add(x[1]),
    jax.lax.cumsum,
  ],
)
def test_sums_in_bfloat16_would_be_found(function):
  assert sums_in_bfloat16(jax.jit(function).lower(np.ones((4, 4), jnp.bfloat16)).as_text())


@pytest.mark.parametrize("network, bound", full(("published_unet", 0.05), ("bilinear_unet", 0.1), ("fcn", 0.3)))
def test_gradients_of_all_parameters_are_near_those_of_float32(network, bound):
  """Biases were off by 43 % where their gradients were summed in bfloat16.

  Batch norm would amplify any rounding, and the FCN's few channels do.
  """
  found = []
  for dtype in ("float32", "bfloat16"):
    function, (*_, image), init = gradient(network, dtype)
    found.append(
      nnx.to_pure_dict(jax.jit(function, compiler_options=UNOPTIMISED)(*init().split(nnx.Param, ...), image))
    )
  errors = jax.tree.map(lambda want, got: np.linalg.norm(got - want) / np.linalg.norm(want), *found)
  assert max(jax.tree.leaves(errors)) < bound, errors
