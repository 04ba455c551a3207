"""Aligned Xception (DeepLabV3+, arXiv 1802.02611, section 3.2 and figure 4), as official DeepLab computes it.

Where the code says more than the paper: the ReLU of a unit stands before each separable convolution and there is none
between depthwise and pointwise, except in the last block; the stride is on the third separable convolution; the
shortcut sees the unit's input before any ReLU, and nothing is rectified after the sum.
"""

import jax
from flax import nnx

from segjax.models import base, layers
from segjax.models.backbones import strides
from segjax.models.deeplab_details import Details


def blocks(depth: int) -> list[tuple[str, int, tuple[int, int, int], int, str]]:
  """(name, units, channels of the three separable convolutions, stride, shortcut) of each block.

  Args:
    depth: 41, 65 or 71, the number of layers.
  """
  middle = ("middle_block1", 8 if depth == 41 else 16, (728, 728, 728), 1, "sum")
  last = [("exit_block1", 1, (728, 1024, 1024), 2, "conv"), ("exit_block2", 1, (1536, 1536, 2048), 1, "none")]
  # Xception-71 has five entry blocks, of which the second and fourth do not stride.
  entry = [(128, 2), (256, 1), (256, 2), (728, 1), (728, 2)] if depth == 71 else [(128, 2), (256, 2), (728, 2)]
  first = [(f"entry_block{n}", 1, (c, c, c), stride, "conv") for n, (c, stride) in enumerate(entry, start=1)]
  return [*first, middle, *last]


class XceptionUnit(layers.Block):
  """Three separable convolutions and a shortcut.

  Args:
    features: output channels of the three.
    stride: of the third, and of the shortcut.
    rate: of all three.
    shortcut: "conv" (1x1 and batch norm), "sum" (the input) or "none".
    rectify: "before" each separable convolution, or "inside": after its depthwise and after its pointwise half.
  """

  def __init__(self, in_features, features, *, stride, rate, shortcut, rectify, options):
    for n in range(3):
      separable = layers.SeparableConv(
        in_features if n == 0 else features[n - 1],
        features[n],
        stride=stride if n == 2 else 1,
        rate=rate,
        padding="fixed",
        activation=jax.nn.relu if rectify == "inside" else layers.linear,
        **options,
      )
      setattr(self, f"sep{n + 1}", separable)
    if shortcut == "conv":
      self.shortcut = layers.ConvNorm(in_features, features[2], stride=stride, activation=layers.linear, **options)
    self.kind, self.rectify = shortcut, rectify

  @layers.rematerialized
  def __call__(self, x: jax.Array, train: bool, endpoints: dict, name: str) -> jax.Array:
    skip = x
    if self.kind == "conv":
      skip = endpoints[f"{name}/shortcut"] = self.shortcut(x, train)
    for n in (1, 2, 3):
      if self.rectify == "before":
        x = jax.nn.relu(x)
        endpoints[f"{name}/sep{n - 1}/relu" if n > 1 else f"{name}/relu"] = x
      x = getattr(self, f"sep{n}")(x, train, endpoints, f"{name}/sep{n}")
    x = endpoints[name] = x if self.kind == "none" else x + skip
    return x


class Xception(base.Backbone):
  """Aligned Xception-41, 65 or 71 without the classifier.

  Args:
    depth: 41, 65 or 71.
    output_stride: 8, 16 or 32.
    multi_grid: factors of the rates of the last block's three convolutions.
    detail: dilate_first.
    bn_momentum, frozen_bn: of batch norm; official: momentum 0.9997.
    channels: of the image.

  The last features at a stride lie inside the next striding block, before its third convolution. Those of stride 4 a
  decoder may take before their ReLU, as officially, or behind.
  """

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
    norm = dict(momentum=bn_momentum, epsilon=1e-3, frozen=frozen_bn)
    options = dict(norm=norm, kernel_init=nnx.initializers.truncated_normal(0.09), dtype=dtype, rngs=rngs)
    self.conv1_1 = layers.ConvNorm(channels, 32, 3, stride=2, padding="fixed", **options)
    self.conv1_2 = layers.ConvNorm(32, 64, 3, **options)
    table, in_features = blocks(depth), 64
    strides_and_rates = strides.strides_to_rates([block[3] for block in table], output_stride // 2, detail.dilate_first)
    for (name, num_units, features, _, shortcut), (stride, rate) in zip(table, strides_and_rates):
      last = name == "exit_block2"
      setattr(self, name, nnx.Module())
      for n in range(num_units):
        unit = XceptionUnit(
          in_features,
          features,
          stride=stride,
          rate=rate,
          shortcut=shortcut,
          rectify="inside" if last else "before",
          options=options,
        )
        setattr(getattr(self, name), f"unit{n + 1}", unit)
        in_features = features[-1]
    for n, factor in enumerate(multi_grid, start=1):
      getattr(self.exit_block2.unit1, f"sep{n}").depthwise.rate *= factor
    self.units = tuple((name, n + 1) for name, num_units, *_ in table for n in range(num_units))
    inside = [(f"{name}/unit1/sep2", features[1]) for name, _, features, stride, _ in table if stride == 2]
    self.pyramid = dict(zip((2, 4, 8, 16, 32), (*inside, ("exit_block2/unit1", in_features))))
    low_level, channels = self.pyramid[4]
    self.low_levels = {low_level: channels, f"{low_level}/relu": channels}

  def __call__(self, image: jax.Array, train: bool, endpoints: dict, key: jax.Array | None = None) -> jax.Array:
    """Image [B, H, W, 3] in [-1, 1] -> features [B, H / output_stride, W / output_stride, 2048], rounded up."""
    x = endpoints["conv1_1"] = self.conv1_1(image, train)
    x = endpoints["conv1_2"] = self.conv1_2(x, train)
    for block, n in self.units:
      x = getattr(getattr(self, block), f"unit{n}")(x, train, endpoints, f"{block}/unit{n}")
    return x
