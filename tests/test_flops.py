"""Multiply-adds against hand counts and against the DeepLabV3+ paper (arXiv 1802.02611, tables 3 and 5)."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from segjax import models
from segjax.kernels import convolution, depthwise
from segjax.models import resize
from segjax.tools import flops
from tests.marks import full

# TensorFlow ran a dense convolution of rate 6, 12 or 18 on a 33x33 map padded to a multiple of the rate, 36x36, and the
# paper's two rows of dense convolutions count that: three branches of 3x3x2048x256.
PADDED = 3 * (36**2 - 33**2) * 9 * 2048 * 256 / 1e9


def count(size, **options):
  model = nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=21, rngs=nnx.Rngs(0), **options))
  graphdef, state = nnx.split(model)
  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  return flops.multiply_adds(lambda state, image: nnx.merge(graphdef, state)(image), state, image)


@pytest.mark.parametrize(
  "billions, size, options",
  [
    (54.17, (513, 513), {}),
    *full(
      (177.10, (513, 513), dict(output_stride=8)),
      (68.00 - PADDED, (513, 513), dict(separable=False, decoder=False)),
      (89.76 - PADDED, (513, 513), dict(separable=False)),
      (418.64, (1025, 2049), {}),
    ),
    (2.75, (513, 513), dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False)),
  ],
)
def test_multiply_adds_are_those_of_the_paper(billions, size, options):
  assert count(size, **options) == pytest.approx(billions * 1e9, rel=0.005)


def test_counts_by_hand():
  image, kernel = jnp.zeros((2, 9, 7, 4)), jnp.zeros((3, 3, 1, 4))
  around = ((1, 1), (1, 1))
  assert (
    flops.multiply_adds(lambda x, k: depthwise.depthwise_conv(x, k, 2, 1, around), image, kernel) == 2 * 5 * 4 * 4 * 9
  )
  assert flops.multiply_adds(lambda x: jnp.einsum("bhwc,cd->bhwd", x, jnp.zeros((4, 6))), image) == 2 * 9 * 7 * 4 * 6
  assert flops.multiply_adds(lambda x: resize.resize_bilinear(x, (18, 14)), image) == 0
  train = lambda x, k: jax.vjp(lambda x, k: convolution.conv(x, k, 1, 1, around), x, k)[1](x)  # noqa: E731
  assert (
    flops.multiply_adds(train, image, jnp.zeros((3, 3, 4, 4))) == 3 * 2 * 9 * 7 * 9 * 4 * 4
  )  # Forward and two gradients.
  loop = lambda x: jax.lax.scan(lambda c, _: (c @ jnp.ones((4, 4)), None), x, length=5)[0]  # noqa: E731
  assert flops.multiply_adds(loop, jnp.zeros((3, 4))) == 5 * 3 * 4 * 4


@pytest.mark.parametrize(
  "parameters, options",
  [
    (41_055_413, {}),
    *full(
      (28_108_661, dict(backbone="xception_41")),
      (43_477_837, dict(backbone="xception_71")),
      (54_711_461, dict(separable=False)),
    ),
    (2_113_557, dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False)),
  ],
)
def test_parameters_are_as_many_as_officially(parameters, options):
  model = nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=21, rngs=nnx.Rngs(0), **options))
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
