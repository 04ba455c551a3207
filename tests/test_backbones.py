"""What every backbone promises."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from segjax.models import backbones
from segjax.models.classifier import Classifier


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


def test_a_classifier_takes_whatever_backbone_is_in_the_table_and_no_other(monkeypatch):
  """Its name tells nothing: not of what is called, nor of whether it gets a key."""

  class Halves(nnx.Module):
    features, normalization = 3, "symmetric"

    def __init__(self, **options):
      assert options.keys() == {"output_stride", "bn_momentum", "frozen_bn", "dtype", "rngs"}

    def __call__(self, image, train, endpoints, key=None):
      return image if key is None else image / 2

  monkeypatch.setitem(backbones.CLASSIFIERS, "halves", Halves)
  model = Classifier(num_classes=2, backbone="halves", rngs=nnx.Rngs(0))
  image = jnp.ones((1, 2, 2, 3))
  assert jnp.abs(model(image)).max() > 1e-3
  assert jnp.allclose(model(image) / 2, model(image, True, jax.random.key(0)), atol=1e-6)  # The bias is 0.
  with pytest.raises(ValueError, match="model.backbone = 'vgg': choose one of xception_41, .*, vgg_16, halves"):
    Classifier(num_classes=2, backbone="vgg", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="model.output_stride = 16: vgg_16 has 32"):
    Classifier(num_classes=2, backbone="vgg_16", output_stride=16, rngs=nnx.Rngs(0))
