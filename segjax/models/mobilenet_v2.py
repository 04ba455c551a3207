"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 2), as official DeepLab computes it.

TensorFlow's native "same" padding everywhere; ReLU6; linear projections; the last 1x1 convolution of the classifier
(1280 channels) is left out, as the paper does for segmentation (section 6.3).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers, strides

# (channels, stride) of the inverted residuals, layers 2 to 18. All but the first expand their input six times.
RESIDUALS = (
  (16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1), (96, 1), (96, 1), (96, 1),
  (160, 2), (160, 1), (160, 1), (320, 1),
)  # fmt: skip


class InvertedResidual(nnx.Module):
  """1x1 expansion, 3x3 depthwise, linear 1x1 projection; plus the input where the shape stays."""

  def __init__(self, in_features, features, *, expansion, stride, rate, options):
    norm, kernel_init = options["norm"], options["kernel_init"]
    wide = in_features * expansion
    if expansion > 1:
      self.expand = layers.ConvNorm(in_features, wide, activation=jax.nn.relu6, **options)
    self.depthwise = layers.DepthwiseConv(
      wide, stride=stride, rate=rate, kernel_init=kernel_init, dtype=options["dtype"], rngs=options["rngs"]
    )
    self.depthwise_norm = layers.BatchNorm(wide, dtype=options["dtype"], **norm)
    self.project = layers.ConvNorm(wide, features, activation=None, **options)
    self.expands, self.adds = expansion > 1, stride == 1 and in_features == features

  def __call__(self, x: jax.Array, train: bool, endpoints: dict, name: str) -> jax.Array:
    skip = x
    x = self.expand(x, train) if self.expands else x
    x = endpoints[f"{name}/depthwise"] = jax.nn.relu6(self.depthwise_norm(self.depthwise(x), train))
    x = self.project(x, train)
    x = endpoints[name] = x + skip if self.adds else x
    return x


class MobileNetV2(nnx.Module):
  """MobileNetV2 of width 1 without the classifier.

  Args:
    output_stride: 8, 16 or 32.
    bn_momentum, frozen_bn: of batch norm; official: momentum 0.997.

  `features`, `low_level` and `low_level_features` as in Xception.
  """

  features = 320
  low_level = "layer_4/depthwise"
  low_level_features = 144

  def __init__(self, *, output_stride, bn_momentum, frozen_bn, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(
      norm=dict(momentum=bn_momentum, epsilon=1e-3, frozen=frozen_bn),
      kernel_init=nnx.initializers.truncated_normal(0.09), dtype=dtype, rngs=rngs,
    )  # fmt: skip
    self.layer_1 = layers.ConvNorm(3, 32, 3, stride=2, activation=jax.nn.relu6, **options)
    in_features = 32
    placed = strides.strides_to_rates([stride for _, stride in RESIDUALS], output_stride // 2)
    for n, ((features, _), (stride, rate)) in enumerate(zip(RESIDUALS, placed), start=2):
      expansion = 1 if n == 2 else 6
      layer = InvertedResidual(
        in_features, features, expansion=expansion, stride=stride, rate=rate, options=options
      )  # fmt: skip
      setattr(self, f"layer_{n}", layer)
      in_features = features

  def __call__(self, image: jax.Array, train: bool, endpoints: dict) -> jax.Array:
    """Image [B, H, W, 3] in [-1, 1] -> features [B, H / output_stride, W / output_stride, 320], rounded up."""
    x = endpoints["layer_1"] = self.layer_1(image, train)
    for n in range(2, len(RESIDUALS) + 2):
      x = getattr(self, f"layer_{n}")(x, train, endpoints, f"layer_{n}")
    return x
