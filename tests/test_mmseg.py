"""mmsegmentation's networks: our numbers are those of an independent implementation in torch."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import pretrained
from tests import seeded, test_peers
from tests.marks import full


class Torch:
  """mmsegmentation's networks with given weights, written with torch's functions alone; arrays are NCHW.

  Each network gives the logits of the image's size and the auxiliary ones.
  """

  def __init__(self, weights, align_corners=False):
    self.torch = pytest.importorskip("torch")
    self.functional, self.align_corners = self.torch.nn.functional, align_corners
    self.w = {key: self.torch.from_numpy(array).double() for key, array in weights.items()}

  def conv(self, x, name, norm, **options):
    x = self.functional.conv2d(x, self.w[f"{name}.weight"], **options)
    leaves = ("running_mean", "running_var", "weight", "bias")
    return self.functional.batch_norm(x, *(self.w[f"{norm}.{leaf}"] for leaf in leaves))

  def module(self, x, name, **options):
    return self.torch.relu(self.conv(x, f"{name}.conv", f"{name}.bn", **options))

  def separable(self, x, name, rate=1):
    x = self.module(x, f"{name}.depthwise_conv", padding=rate, dilation=rate, groups=x.shape[1])
    return self.module(x, f"{name}.pointwise_conv")

  def classify(self, x, head):
    return self.functional.conv2d(x, self.w[f"{head}.conv_seg.weight"], self.w[f"{head}.conv_seg.bias"])

  def auxiliary(self, x):
    return self.classify(self.module(x, "auxiliary_head.convs.0", padding=1), "auxiliary_head")

  def resize(self, x, size):
    return self.functional.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

  def resnet(self, x, units, strides, dilations):
    """Its four stages' features; `dilations` are those of each unit of each stage."""
    for n, stride in ((0, 2), (3, 1), (6, 1)):
      x = self.torch.relu(self.conv(x, f"backbone.stem.{n}", f"backbone.stem.{n + 1}", stride=stride, padding=1))
    x, stages = self.functional.max_pool2d(x, 3, 2, 1), []
    for stage in range(4):
      for unit in range(units[stage]):
        name, stride, rate = f"backbone.layer{stage + 1}.{unit}", 1 if unit else strides[stage], dilations[stage][unit]
        y = self.torch.relu(self.conv(x, f"{name}.conv1", f"{name}.bn1"))
        y = self.torch.relu(self.conv(y, f"{name}.conv2", f"{name}.bn2", stride=stride, padding=rate, dilation=rate))
        y = self.conv(y, f"{name}.conv3", f"{name}.bn3")
        x = x if unit else self.conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride=stride)
        x = self.torch.relu(x + y)
      stages.append(x)
    return stages

  def mobilenet(self, x):
    """The first stage's features, and those of the fifth and of the last."""

    def relu6_module(x, name, **options):
      return self.functional.relu6(self.conv(x, f"{name}.conv", f"{name}.bn", **options))

    x, stages = relu6_module(x, "backbone.conv1", stride=2, padding=1), []
    for stage, (units, stride, rate) in enumerate(
      ((1, 1, 1), (2, 2, 1), (3, 2, 1), (4, 1, 2), (3, 1, 2), (3, 1, 4), (1, 1, 4)), start=1
    ):
      for unit in range(units):
        name, y = f"backbone.layer{stage}.{unit}.conv", x
        step, first = 1 if unit else stride, 0 if stage == 1 else 1
        y = relu6_module(y, f"{name}.0") if first else y
        y = relu6_module(y, f"{name}.{first}", stride=step, padding=rate, dilation=rate, groups=y.shape[1])
        y = self.conv(y, f"{name}.{first + 1}.conv", f"{name}.{first + 1}.bn")
        x = x + y if step == 1 and x.shape == y.shape else y
      stages.append(x)
    return stages[1], stages[4], stages[6]

  def deeplab(self, image, rates, low_level, inner, x):
    pooled = self.module(x.mean((2, 3), keepdim=True), "decode_head.image_pool.1").expand(-1, -1, *x.shape[2:])
    branches = [self.separable(x, f"decode_head.aspp_modules.{n}", rate) for n, rate in enumerate(rates, start=1)]
    x = self.torch.cat([pooled, self.module(x, "decode_head.aspp_modules.0"), *branches], 1)
    x, low_level = (
      self.module(x, "decode_head.bottleneck", padding=1),
      self.module(low_level, "decode_head.c1_bottleneck"),
    )
    x = self.torch.cat([self.resize(x, low_level.shape[2:]), low_level], 1)
    for n in (0, 1):
      x = self.separable(x, f"decode_head.sep_bottleneck.{n}")
    return self.resize(self.classify(x, "decode_head"), image.shape[2:]), self.auxiliary(inner)

  def deeplab_resnet(self, image, *, rates, **backbone):
    low_level, _, inner, x = self.resnet(image, **backbone)
    return self.deeplab(image, rates, low_level, inner, x)

  def deeplab_mobilenet(self, image, *, rates):
    return self.deeplab(image, rates, *self.mobilenet(image))

  def fcn(self, image, **backbone):
    *_, inner, features = self.resnet(image, **backbone)
    x = features
    for n in (0, 1):
      x = self.module(x, f"decode_head.convs.{n}", padding=1)
    x = self.module(self.torch.cat([features, x], 1), "decode_head.conv_cat", padding=1)
    return self.resize(self.classify(x, "decode_head"), image.shape[2:]), self.auxiliary(inner)

  def unet(self, x):
    def double(x, name):
      return self.module(self.module(x, f"{name}.convs.0", padding=1), f"{name}.convs.1", padding=1)

    skips, inner = [], None
    for level in range(5):
      x = self.functional.max_pool2d(x, 2) if level else x
      x = double(x, f"backbone.encoder.{level}.{min(level, 1)}")
      skips.append(x)
    for level in reversed(range(4)):
      name, inner = f"backbone.decoder.{level}", x
      x = self.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
      x = self.module(x, f"{name}.upsample.interp_upsample.1")
      x = double(self.torch.cat([skips[level], x], 1), f"{name}.conv_block")
    return self.classify(self.module(x, "decode_head.convs.0", padding=1), "decode_head"), self.auxiliary(inner)


D8 = dict(units=(3, 4, 6, 3), strides=(1, 2, 1, 1), dilations=([1] * 3, [1] * 4, [1] + [2] * 5, [2, 4, 4]))
MG124 = dict(units=(3, 4, 23, 3), strides=(1, 2, 2, 1), dilations=([1] * 3, [1] * 4, [1] * 23, [1, 2, 4]))
WIDE, USUAL = dict(rates=(12, 24, 36)), dict(rates=(6, 12, 18))
ODD, EVEN = (65, 97), (64, 96)


@pytest.mark.parametrize(
  "names, network, method, options, size, align_corners",
  [
    *full(("deeplabv3plus_r50-d8_cityscapes", "deeplabv3plus_r50-d8", "deeplab_resnet", D8 | WIDE, ODD, False)),
    *full(("deeplabv3plus_r50-d8_cityscapes", "deeplabv3plus_r50-d8_769", "deeplab_resnet", D8 | WIDE, ODD, True)),
    *full(
      (
        "deeplabv3plus_r101-d16-mg124_cityscapes",
        "deeplabv3plus_r101-d16-mg124",
        "deeplab_resnet",
        MG124 | USUAL,
        ODD,
        False,
      )
    ),
    *full(
      (
        "deeplabv3plus_mobilenet-v2-d8_cityscapes",
        "deeplabv3plus_mobilenet-v2-d8",
        "deeplab_mobilenet",
        WIDE,
        ODD,
        False,
      )
    ),
    *full(("fcn_r50-d8_voc12aug", "fcn_r50-d8", "fcn", D8, ODD, False)),
    *full(("unet-s5-d16_fcn_cityscapes", "unet-s5-d16_fcn", "unet", {}, EVEN, False)),
  ],
)
def test_logits_equal_an_independent_torch_implementation(names, network, method, options, size, align_corners):
  gain = 0.7 if "_r" in names else 1.0  # A ResNet's blocks add up.
  weights = seeded.torch_weights(test_peers.shapes(f"mmseg_{names}"), gain)
  image = np.random.default_rng(0).standard_normal([1, 3, *size]).astype(np.float32)
  peer = Torch(weights, align_corners)
  wanted = getattr(peer, method)(peer.torch.from_numpy(image).double(), **options)
  num_classes = wanted[0].shape[1]
  model = nnx.eval_shape(lambda: pretrained.build(f"mmseg/{network}", num_classes=num_classes, rngs=nnx.Rngs(0)))
  pretrained.assign(model, weights, "mmseg")
  logits, endpoints = test_peers.forward(model, jnp.asarray(image.transpose(0, 2, 3, 1)))
  for got, want in zip((logits, endpoints["auxiliary"]), wanted):
    assert want.abs().max() > 0.2
    np.testing.assert_allclose(
      np.asarray(got).transpose(0, 3, 1, 2), want.numpy(), atol=1e-5 * max(1, float(want.abs().max()))
    )
