"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 2), as official DeepLab computes it.

TensorFlow's native "same" padding everywhere; ReLU6; linear projections; the last 1x1 convolution of the classifier
(1280 channels) is left out, as the paper does for segmentation (section 6.3). PyTorch's differences are options.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import base, layers
from segjax.models.backbones import strides
from segjax.models.deeplab_details import Details

# (channels, stride) of the inverted residuals, layers 2 to 18. All but the first expand their input six times.
RESIDUALS = (
  (16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1), (96, 1), (96, 1), (96, 1),
  (160, 2), (160, 1), (160, 1), (320, 1),
)  # fmt: skip


class InvertedResidual(layers.Block):
  """1x1 expansion, 3x3 depthwise, linear 1x1 projection; plus the input where the shape stays."""

  def __init__(self, in_features, features, *, expansion, stride, rate, padding, options):
    norm, kernel_init = options["norm"], options["kernel_init"]
    wide = in_features * expansion
    if expansion > 1:
      self.expand = layers.ConvNorm(in_features, wide, activation=jax.nn.relu6, **options)
    self.depthwise = layers.DepthwiseConv(
      wide, stride=stride, rate=rate, padding="valid" if padding == "early" else padding, kernel_init=kernel_init,
      dtype=options["dtype"], rngs=options["rngs"],
    )  # fmt: skip
    self.depthwise_norm = layers.BatchNorm(wide, dtype=options["dtype"], **norm)
    self.project = layers.ConvNorm(wide, features, activation=layers.linear, **options)
    self.expands, self.adds = expansion > 1, stride == 1 and in_features == features
    self.pad = rate if padding == "early" else 0  # Pixels around the block's input.

  @layers.rematerialized
  def __call__(self, x: jax.Array, train: bool, endpoints: dict, name: str) -> jax.Array:
    skip, pad = x, (self.pad, self.pad)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    x = self.expand(x, train) if self.expands else x
    x = endpoints[f"{name}/depthwise"] = self.depthwise_norm(self.depthwise(x), train, jax.nn.relu6)
    x = self.project(x, train)
    x = endpoints[name] = x + skip if self.adds else x
    return x


class MobileNetV2(base.Backbone):
  """MobileNetV2 of width 1 without the classifier.

  Args:
    output_stride: 8, 16 or 32.
    multi_grid: it has none: (1, 1, 1).
    detail: dilate_first, and those of a MobileNetV2.
    bn_momentum, frozen_bn: of batch norm; official: momentum 0.997.

  Raises:
    ValueError: another multi-grid.
  """

  def __init__(self, *, output_stride, multi_grid, detail: Details, bn_momentum, frozen_bn, dtype=jnp.float32,
               rngs: nnx.Rngs):  # fmt: skip
    if multi_grid != (1, 1, 1):
      raise ValueError(f"model.multi_grid = {multi_grid!r}: mobilenet_v2 has none, leave it at (1, 1, 1).")
    padding = detail.mobilenet_padding
    options = dict(
      norm=dict(momentum=bn_momentum, epsilon=detail.mobilenet_epsilon, frozen=frozen_bn),
      kernel_init=nnx.initializers.truncated_normal(0.09), dtype=dtype, rngs=rngs,
    )  # fmt: skip
    self.low_levels = {"layer_4/depthwise": 144, "layer_4": 24}
    self.layer_1 = layers.ConvNorm(
      3, 32, 3, stride=2, padding="valid" if padding == "early" else padding, activation=jax.nn.relu6, **options
    )
    in_features = 32
    placed = strides.strides_to_rates([stride for _, stride in RESIDUALS], output_stride // 2, detail.dilate_first)
    for n, ((features, _), (stride, rate)) in enumerate(zip(RESIDUALS, placed), start=2):
      expansion = 1 if n == 2 else 6
      layer = InvertedResidual(
        in_features, features, expansion=expansion, stride=stride, rate=rate, padding=padding, options=options
      )  # fmt: skip
      setattr(self, f"layer_{n}", layer)
      in_features = features
    last = detail.mobilenet_last_conv
    self.layer_19 = layers.ConvNorm(in_features, 1280, activation=jax.nn.relu6, **options) if last else None
    self.pyramid = {4: ("layer_4", 24), 8: ("layer_7", 32), 16: ("layer_14", 96)}
    self.pyramid[32] = ("layer_19", 1280) if last else ("layer_18", in_features)

  def __call__(self, image: jax.Array, train: bool, endpoints: dict, key: jax.Array | None = None) -> jax.Array:
    """Image [B, H, W, 3] in [-1, 1] -> features [B, H / output_stride, W / output_stride, 320], rounded up.

    1280 channels with the last convolution.
    """
    x = endpoints["layer_1"] = self.layer_1(image, train)
    for n in range(2, len(RESIDUALS) + 2):
      x = getattr(self, f"layer_{n}")(x, train, endpoints, f"layer_{n}")
    if self.layer_19 is not None:
      x = endpoints["layer_19"] = self.layer_19(x, train)
    return x
