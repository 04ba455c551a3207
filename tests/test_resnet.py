"""ResNet as a backbone: its size, its rates, its gradients; its numbers are compared with PyTorch's in test_peers.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import models, pretrained
from segjax.models import backbones
from segjax.models.deeplab_details import Details
from segjax.tools import flops
from tests.marks import full
from tests.test_deeplab import lively_model, lively_state, noise


def abstract(name, **options):
  options = dict(output_stride=32, bn_momentum=0.9, frozen_bn=False, dtype=jnp.float32) | options
  return nnx.eval_shape(lambda: backbones.build(name, rngs=nnx.Rngs(0), **options))


@pytest.mark.parametrize("depth, parameters, billions", [(50, 25_557_032, 4.09), *full((101, 44_549_160, 7.80))])
def test_classifier_has_the_published_parameters_and_multiply_adds(depth, parameters, billions):
  """torchvision's documentation, for a 224x224 image."""
  model = nnx.eval_shape(lambda: pretrained.build(f"torchvision/resnet{depth}", num_classes=1000, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  counted = flops.multiply_adds(lambda state, image: nnx.merge(graphdef, state)(image), state, image)
  assert round(counted / 1e9, 2) == billions


def rates(backbone):
  return {
    f"block{b}/unit{n}": getattr(getattr(backbone, f"block{b}"), f"unit{n}").conv2.conv.rate for b, n in backbone.units
  }


def test_rates_and_multi_grid_are_where_they_belong():
  found = rates(abstract("resnet_50", output_stride=8, multi_grid=(1, 2, 4)))
  assert [found[f"block3/unit{n}"] for n in (1, 2, 6)] == [1, 2, 2]  # The first samples as densely as before.
  assert [found[f"block4/unit{n}"] for n in (1, 2, 3)] == [2, 4 * 2, 4 * 4]
  assert set(found[f"block{b}/unit1"] for b in (1, 2)) == {1}
  at_once = Details(dilate_first=True)
  found = rates(abstract("resnet_50", output_stride=16, multi_grid=(1, 2, 4), detail=at_once))
  assert [found[f"block4/unit{n}"] for n in (1, 2, 3)] == [2, 4, 8]  # arXiv 1706.05587, section 3.2.1.
  assert found["block3/unit6"] == 1


@pytest.mark.slow
def test_output_strides_agree_where_they_sample_the_same_pixel():
  image, options = noise(1, 65, 97, 3), dict(backbone="resnet_50", decoder=False, atrous_rates=())
  at = {stride: lively_model(output_stride=stride, **options)(image)[1] for stride in (8, 16, 32)}
  for name, stride, step in (("block3", 16, 2), ("block3", 32, 2), ("block4", 16, 2), ("block4", 32, 4)):
    dense = at[8][name]
    atol = 1e-5 * float(jnp.abs(dense).max())
    np.testing.assert_allclose(dense[:, ::step, ::step], at[stride][name], atol=atol, err_msg=f"{name} at {stride}")


@pytest.mark.slow
def test_gradients_are_finite_and_reach_every_parameter():
  options = dict(num_classes=3, backbone="resnet_50", auxiliary=True, atrous_rates=(1, 2, 3), dropout=0.0)
  graphdef, state = lively_state(nnx.eval_shape(lambda: models.build("deeplab_v3plus", rngs=nnx.Rngs(0), **options)))
  image = noise(2, 33, 33, 3)

  @jax.jit
  @jax.grad
  def gradient(params, rest):
    endpoints = {}
    logits = nnx.merge(graphdef, params, rest, copy=True)(image, train=True, endpoints=endpoints)
    return sum((jnp.sin(3 * output) ** 2).mean() for output in (logits, endpoints["auxiliary"]))

  params, rest = nnx.split_state(state, nnx.Param, ...)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params, rest)):
    assert jnp.isfinite(leaf).all() and jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("network", ["deeplab_v3plus", "dilated_fcn"])
def test_an_xception_has_no_auxiliary_head(network):
  message = "model.auxiliary = True: only a ResNet and mobilenet_v2 have one, xception_65 has not"
  with pytest.raises(ValueError, match=message):
    nnx.eval_shape(
      lambda: models.build(network, num_classes=3, backbone="xception_65", auxiliary=True, rngs=nnx.Rngs(0))
    )


@pytest.mark.parametrize("size", [(33, 49), (32, 46), (1, 7)])
def test_dilated_fcn_takes_images_of_any_size(size):
  def forward(image):
    endpoints = {}
    model = models.build("dilated_fcn", num_classes=3, auxiliary=True, rngs=nnx.Rngs(0))
    return model(image, endpoints=endpoints), model(image, upsample=False), endpoints["auxiliary"]

  large, small, auxiliary = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, *size, 3), jnp.bfloat16))
  assert large.shape == (2, *size, 3) and large.dtype == auxiliary.dtype == jnp.float32
  assert small.shape == auxiliary.shape == (2, -(-size[0] // 8), -(-size[1] // 8), 3)


def test_an_unknown_low_level_end_point_lists_the_known_ones():
  detail = Details(low_level="layer_3")
  with pytest.raises(ValueError, match="low_level = 'layer_3': choose auto, layer_4/depthwise, layer_4."):
    abstract("mobilenet_v2", detail=detail)
