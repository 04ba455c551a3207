"""What every backbone promises."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from segjax.models import backbones


@pytest.mark.parametrize("output_stride", [8, 32])
@pytest.mark.parametrize("name", backbones.BACKBONES)
def test_its_pyramid_has_the_strides_and_channels_that_it_says(name, output_stride):
  @nnx.eval_shape
  def build():
    options = dict(output_stride=output_stride, bn_momentum=0.9, frozen_bn=False, dtype=jnp.float32)
    return backbones.build(name, rngs=nnx.Rngs(0), **options)

  graphdef, state = nnx.split(build)

  def run(state, image):
    endpoints = {}
    return nnx.merge(graphdef, state)(image, False, endpoints), endpoints

  features, endpoints = jax.eval_shape(run, state, jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32))
  for stride in (4, 8, 16, 32):
    endpoint, channels = build.pyramid[stride]
    actual = min(stride, output_stride)
    assert endpoints[endpoint].shape == (1, 64 // actual, 96 // actual, channels), stride
  assert features.shape == endpoints[build.pyramid[32][0]].shape and build.features == features.shape[-1]
  for endpoint, channels in build.low_levels.items():
    assert endpoints[endpoint].shape == (1, 16, 24, channels)
