"""ResNet-18, 34, 50 and 101 (He et al. 2016, arXiv 1512.03385, table 1), with the stride in a unit's first 3x3 convolution.

The paper has the stride in a bottleneck's first 1x1 convolution; this variant ("v1.5") is that of the weights in common use. Padding is
symmetric everywhere, as PyTorch's.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import base, layers
from segjax.models.backbones import strides
from segjax.models.deeplab_details import Details

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # Of the four blocks.
EPSILON = 1e-5  # Of the batch norms.


def max_pool_3x3(x: jax.Array) -> jax.Array:
  """3x3 windows at stride 2, centred on every second pixel: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C].

  Outside the image is -inf. Pairwise maxima, as in kernels/max_pool.py.
  """
  for axis in (1, 2):
    size = x.shape[axis]
    outside = [(1, 1) if n == axis else (0, 0) for n in range(4)]
    padded = jnp.pad(x, outside, constant_values=-jnp.inf)
    taps = [jax.lax.slice_in_dim(padded, k, k + 2 * ((size - 1) // 2) + 1, 2, axis) for k in range(3)]
    x = jnp.maximum(jnp.maximum(taps[0], taps[1]), taps[2])
  return x


class Unit(layers.Block):
  """What `_residual` gives, plus the input, by a 1x1 convolution where the shape changes; ReLU."""

  def _make_shortcut(self, in_features, features, stride, options):
    """To be called last in a constructor: it draws its weights behind those of the convolutions."""
    self.projects = stride > 1 or in_features != features
    if self.projects:
      self.shortcut = layers.ConvNorm(in_features, features, stride=stride, activation=layers.linear, **options)

  @layers.rematerialized
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, H, W, in] -> [B, H / stride, W / stride, features]."""
    skip = self.shortcut(x, train) if self.projects else x
    return jax.nn.relu(self._residual(x, train) + skip)


class Bottleneck(Unit):
  """1x1 to a quarter of the channels, 3x3, 1x1.

  Args:
    stride, rate: of the 3x3 convolution; the stride also of the shortcut.
  """

  def __init__(self, in_features, features, *, stride, rate, options):
    width = features // 4
    self.conv1 = layers.ConvNorm(in_features, width, **options)
    self.conv2 = layers.ConvNorm(width, width, 3, stride=stride, rate=rate, padding="fixed", **options)
    self.conv3 = layers.ConvNorm(width, features, activation=layers.linear, **options)
    self._make_shortcut(in_features, features, stride, options)

  def _residual(self, x, train):
    return self.conv3(self.conv2(self.conv1(x, train), train), train)


class BasicUnit(Unit):
  """Twice 3x3.

  Args:
    stride: of the first convolution and of the shortcut.
    rate: of both convolutions.
  """

  def __init__(self, in_features, features, *, stride, rate, options):
    conv = dict(rate=rate, padding="fixed", **options)
    self.conv1 = layers.ConvNorm(in_features, features, 3, stride=stride, **conv)
    self.conv2 = layers.ConvNorm(features, features, 3, activation=layers.linear, **conv)
    self._make_shortcut(in_features, features, stride, options)

  def _residual(self, x, train):
    return self.conv2(self.conv1(x, train), train)


class ResNet(base.Backbone):
  """ResNet-18, 34, 50 or 101 without the classifier.

  Args:
    depth: 18, 34, 50 or 101.
    output_stride: 8, 16 or 32.
    multi_grid: factors of the rates in the last block's three units (arXiv 1706.05587, section 3.2.1).
    detail: resnet_deep_stem, dilate_first. On, with an output stride of 16 and multi-grid 1, 2, 4, is that paper's 2, 4, 8.
    bn_momentum, frozen_bn: of batch norm.
    channels: of the image.
  """

  normalization = "imagenet"

  def __init__(
    self,
    depth,
    *,
    output_stride,
    multi_grid,
    detail: Details,
    bn_momentum,
    frozen_bn,
    channels=3,
    dtype,
    rngs: nnx.Rngs,
  ):
    norm = dict(momentum=bn_momentum, epsilon=EPSILON, frozen=frozen_bn)
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    unit_class, width = (BasicUnit, 64) if depth < 50 else (Bottleneck, 256)
    self.low_levels = {"block1": width}
    self.pyramid = {2: ("conv1", 64)}
    self.pyramid |= {2 ** (block + 1): (f"block{block}", width * 2 ** (block - 1)) for block in range(1, 5)}
    self.auxiliary = ("block3", 4 * width, width)
    if detail.resnet_deep_stem:
      self.stem, widths = ("conv1_1", "conv1_2", "conv1"), (channels, 32, 32, 64)
    else:
      self.stem, widths = ("conv1",), (channels, 64)
    for n, name in enumerate(self.stem):
      kernel_size, stride = 3 if detail.resnet_deep_stem else 7, 1 if n else 2
      conv = layers.ConvNorm(*widths[n : n + 2], kernel_size, stride=stride, padding="fixed", **options)
      setattr(self, name, conv)
    units = [(block, n) for block, count in enumerate(UNITS[depth], start=1) for n in range(1, count + 1)]
    strides_and_rates = strides.strides_to_rates(
      [2 if block > 1 and n == 1 else 1 for block, n in units], output_stride // 4, detail.dilate_first
    )
    in_features = 64
    for (block, n), (stride, rate) in zip(units, strides_and_rates):
      if n == 1:
        setattr(self, f"block{block}", nnx.Module())
      factor = multi_grid[n - 1] if block == 4 else 1
      features = width * 2 ** (block - 1)
      unit = unit_class(in_features, features, stride=stride, rate=rate * factor, options=options)
      setattr(getattr(self, f"block{block}"), f"unit{n}", unit)
      in_features = features
    self.units = tuple(units)

  def __call__(self, image: jax.Array, train: bool, endpoints: dict, key: jax.Array | None = None) -> jax.Array:
    """Image [B, H, W, 3] -> features [B, H / output_stride, W / output_stride, `features`], rounded up."""
    x = image
    for name in self.stem:
      x = endpoints[name] = getattr(self, name)(x, train)
    x = endpoints["pool1"] = max_pool_3x3(x)
    for block, n in self.units:
      x = getattr(getattr(self, f"block{block}"), f"unit{n}")(x, train)
      endpoints[f"block{block}/unit{n}"] = endpoints[f"block{block}"] = x
    return x
