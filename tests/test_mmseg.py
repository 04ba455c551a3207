"""mmsegmentation's DeepLabV3+ on ResNetV1c: our numbers are those of an independent implementation in torch."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import pretrained
from tests import seeded, test_peers
from tests.marks import full


def deeplab(weights, image, *, units, strides, dilations, rates, align_corners):
  """Logits of the image's size and the auxiliary ones, NCHW, written with torch's functions alone.

  Args:
    dilations: of each unit of each stage.
  """
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  w = {key: torch.from_numpy(array).double() for key, array in weights.items()}

  def conv(x, name, norm, **options):
    x = functional.conv2d(x, w[f"{name}.weight"], **options)
    return functional.batch_norm(
      x, *(w[f"{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
    )

  def module(x, name, **options):
    return torch.relu(conv(x, f"{name}.conv", f"{name}.bn", **options))

  def separable(x, name, rate=1):
    x = module(x, f"{name}.depthwise_conv", padding=rate, dilation=rate, groups=x.shape[1])
    return module(x, f"{name}.pointwise_conv")

  def classify(x, head):
    return functional.conv2d(x, w[f"{head}.conv_seg.weight"], w[f"{head}.conv_seg.bias"])

  def resize(x, size):
    return functional.interpolate(x, size, mode="bilinear", align_corners=align_corners)

  x = torch.from_numpy(image).double()
  for n, stride in ((0, 2), (3, 1), (6, 1)):
    x = torch.relu(conv(x, f"backbone.stem.{n}", f"backbone.stem.{n + 1}", stride=stride, padding=1))
  x, stages = functional.max_pool2d(x, 3, 2, 1), []
  for stage in range(4):
    for unit in range(units[stage]):
      name, stride, rate = f"backbone.layer{stage + 1}.{unit}", 1 if unit else strides[stage], dilations[stage][unit]
      y = torch.relu(conv(x, f"{name}.conv1", f"{name}.bn1"))
      y = torch.relu(conv(y, f"{name}.conv2", f"{name}.bn2", stride=stride, padding=rate, dilation=rate))
      y = conv(y, f"{name}.conv3", f"{name}.bn3")
      x = x if unit else conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
      x = torch.relu(x + y)
    stages.append(x)
  pooled = module(x.mean((2, 3), keepdim=True), "decode_head.image_pool.1").expand(-1, -1, *x.shape[2:])
  branches = [separable(x, f"decode_head.aspp_modules.{n}", rate) for n, rate in enumerate(rates, start=1)]
  x = torch.cat([pooled, module(x, "decode_head.aspp_modules.0"), *branches], 1)
  x, low_level = module(x, "decode_head.bottleneck", padding=1), module(stages[0], "decode_head.c1_bottleneck")
  x = torch.cat([resize(x, low_level.shape[2:]), low_level], 1)
  for n in (0, 1):
    x = separable(x, f"decode_head.sep_bottleneck.{n}")
  auxiliary = classify(module(stages[2], "auxiliary_head.convs.0", padding=1), "auxiliary_head")
  return resize(classify(x, "decode_head"), image.shape[2:]).numpy(), auxiliary.numpy()


D8 = dict(
  units=(3, 4, 6, 3),
  strides=(1, 2, 1, 1),
  dilations=([1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]),
  rates=(12, 24, 36),
)
MG124 = dict(
  units=(3, 4, 23, 3), strides=(1, 2, 2, 1), dilations=([1] * 3, [1] * 4, [1] * 23, [1, 2, 4]), rates=(6, 12, 18)
)


@pytest.mark.parametrize(
  "names, network, options",
  [
    *full(("r50-d8", "r50-d8", D8 | dict(align_corners=False))),
    *full(("r50-d8", "r50-d8_769", D8 | dict(align_corners=True))),
    *full(("r101-d16-mg124", "r101-d16-mg124", MG124 | dict(align_corners=False))),
  ],
)
def test_logits_equal_an_independent_torch_implementation(names, network, options):
  weights = seeded.torch_weights(test_peers.shapes(f"mmseg_deeplabv3plus_{names}_cityscapes"), 0.7)
  image = np.random.default_rng(0).standard_normal([1, 3, 65, 97]).astype(np.float32)
  wanted = deeplab(weights, image, **options)
  model = nnx.eval_shape(lambda: pretrained.build(f"mmseg/deeplabv3plus_{network}", num_classes=19, rngs=nnx.Rngs(0)))
  pretrained.assign(model, weights, "mmseg")
  logits, endpoints = test_peers.forward(model, jnp.asarray(image.transpose(0, 2, 3, 1)))
  for got, want in zip((logits, endpoints["auxiliary"]), wanted):
    assert np.abs(want).max() > 0.2
    np.testing.assert_allclose(np.asarray(got).transpose(0, 3, 1, 2), want, atol=1e-5)
