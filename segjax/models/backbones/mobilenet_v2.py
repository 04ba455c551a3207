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
LAST = 1280  # Channels of the classifier's last convolution.


def divisible(channels: float, divisor: int) -> int:
  """The multiple of `divisor` next to a number of channels, but at least `divisor` and 90 % of them (official slim)."""
  rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(layers.Block):
  """1x1 expansion to `wide` channels, 3x3 depthwise, linear 1x1 projection; plus the input where the shape stays.

  Where `wide` is `in_features`, there is no expansion.
  """

  def __init__(self, in_features, wide, features, *, stride, rate, padding, options):
    norm, kernel_init = options["norm"], options["kernel_init"]
    self.expands = wide > in_features
    if self.expands:
      self.expand = layers.ConvNorm(in_features, wide, activation=jax.nn.relu6, **options)
    self.depthwise = layers.DepthwiseConv(
      wide,
      stride=stride,
      rate=rate,
      padding="valid" if padding == "early" else padding,
      kernel_init=kernel_init,
      dtype=options["dtype"],
      rngs=options["rngs"],
    )
    self.depthwise_norm = layers.BatchNorm(wide, dtype=options["dtype"], **norm)
    self.project = layers.ConvNorm(wide, features, activation=layers.linear, **options)
    self.adds = stride == 1 and in_features == features
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
  """MobileNetV2 without the classifier.

  Args:
    output_stride: 8, 16 or 32.
    depth_multiplier: of all numbers of channels, which are then rounded, see `Details.mobilenet_divisor`.
    multi_grid: it has none: (1, 1, 1).
    detail: dilate_first, and those of a MobileNetV2.
    bn_momentum, frozen_bn: of batch norm; official: momentum 0.997.
    channels: of the image.

  Raises:
    ValueError: another multi-grid.
  """

  def __init__(
    self,
    *,
    output_stride,
    multi_grid,
    detail: Details,
    bn_momentum,
    frozen_bn,
    depth_multiplier=1.0,
    channels=3,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if multi_grid != (1, 1, 1):
      raise ValueError(f"model.multi_grid = {multi_grid!r}: mobilenet_v2 has none, leave it at (1, 1, 1).")
    padding = detail.mobilenet_padding
    options = dict(
      norm=dict(momentum=bn_momentum, epsilon=detail.mobilenet_epsilon, frozen=frozen_bn),
      kernel_init=nnx.initializers.truncated_normal(0.09),
      dtype=dtype,
      rngs=rngs,
    )
    divisor = detail.mobilenet_divisor or (8 if depth_multiplier == 1 else 1)
    in_features, *widths = (divisible(n * depth_multiplier, divisor) for n in (32, *(n for n, _ in RESIDUALS)))
    first = "valid" if padding == "early" else padding
    self.layer_1 = layers.ConvNorm(
      channels, in_features, 3, stride=2, padding=first, activation=jax.nn.relu6, **options
    )
    self.low_levels, ends, sampled = {}, {}, 2  # By stride, its last layer.
    placed = strides.strides_to_rates([stride for _, stride in RESIDUALS], output_stride // 2, detail.dilate_first)
    for n, (features, (stride, rate)) in enumerate(zip(widths, placed), start=2):
      wide = in_features if n == 2 else divisible(6 * in_features, 8)
      layer = InvertedResidual(in_features, wide, features, stride=stride, rate=rate, padding=padding, options=options)
      setattr(self, f"layer_{n}", layer)
      self.low_levels |= {"layer_4/depthwise": wide, "layer_4": features} if n == 4 else {}
      sampled *= RESIDUALS[n - 2][1]
      ends[sampled] = f"layer_{n}", features
      in_features = features
    self.auxiliary = (*ends[16], 256)  # mmsegmentation's width.
    last = divisible(LAST * max(depth_multiplier, 1), 8)  # No multiplier narrows it (slim).
    self.layer_19 = (
      layers.ConvNorm(in_features, last, activation=jax.nn.relu6, **options) if detail.mobilenet_last_conv else None
    )
    self.pyramid = ends if self.layer_19 is None else ends | {32: ("layer_19", last)}

  def __call__(self, image: jax.Array, train: bool, endpoints: dict, key: jax.Array | None = None) -> jax.Array:
    """Image [B, H, W, 3] in [-1, 1] -> features [B, H / output_stride, W / output_stride, `features`], rounded up.

    320 at depth multiplier 1; 1280 with the last convolution.
    """
    x = endpoints["layer_1"] = self.layer_1(image, train)
    for n in range(2, len(RESIDUALS) + 2):
      x = getattr(self, f"layer_{n}")(x, train, endpoints, f"layer_{n}")
    if self.layer_19 is not None:
      x = endpoints["layer_19"] = self.layer_19(x, train)
    return x
