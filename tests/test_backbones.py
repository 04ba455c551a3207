"""What every backbone promises."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from segjax.models import backbones
from segjax.models.classifier import Classifier
from segjax.models.deeplab_details import Details


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


# Channels of the first layer and of the residuals: slim's own table (Keras has the same), and those in
# deeplabv3_257_mv_gpu.tflite, which official DeepLab's code does not round.
@pytest.mark.parametrize(
  "depth_multiplier, divisor, first, widths, last",
  [
    (0.35, 8, 16, (8, 8, 16, 24, 32, 56, 112), 1280),
    (0.5, 8, 16, (8, 16, 16, 32, 48, 80, 160), 1280),
    (0.75, 8, 24, (16, 24, 24, 48, 72, 120, 240), 1280),
    (1.0, 0, 32, (16, 24, 32, 64, 96, 160, 320), 1280),
    (1.4, 8, 48, (24, 32, 48, 88, 136, 224, 448), 1792),
    (0.5, 0, 16, (8, 12, 16, 32, 48, 80, 160), 1280),
  ],
)
def test_a_depth_multiplier_gives_the_channels_of_the_published_networks(
  depth_multiplier, divisor, first, widths, last
):
  @nnx.eval_shape
  def network():
    detail = Details(mobilenet_divisor=divisor, mobilenet_last_conv=True)
    options = dict(output_stride=16, bn_momentum=0.9, frozen_bn=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return backbones.build("mobilenet_v2", depth_multiplier=depth_multiplier, detail=detail, **options)

  repeated = [width for width, count in zip(widths, (1, 2, 3, 4, 3, 3, 1)) for _ in range(count)]
  found = [getattr(network, f"layer_{n}").project.conv.kernel.shape[-1] for n in range(2, 19)]
  assert found == repeated and network.layer_1.conv.kernel.shape == (3, 3, 3, first)
  expansions = [getattr(network, f"layer_{n}").depthwise.depthwise_kernel.shape[-1] for n in range(2, 19)]
  assert expansions[0] == first and expansions[1:] == [-(-6 * n // 8) * 8 for n in repeated[:-1]]
  assert network.features == network.layer_19.conv.kernel.shape[-1] == last
  assert network.low_levels == {"layer_4/depthwise": expansions[2], "layer_4": widths[1]}
  assert network.pyramid[16] == ("layer_14", widths[4])


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
