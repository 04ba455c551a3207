"""The U-Net's expanding path on an encoder that was trained to classify images (Yakubovskiy, segmentation_models_pytorch)."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import base, layers

FEATURES = (256, 128, 64, 32, 16)  # Channels at strides 16, 8, 4, 2, 1.


class DoubleConv(nnx.Module):
  """Twice 3x3 convolution, batch norm, ReLU."""

  def __init__(self, in_features, features, options):
    self.conv1 = layers.ConvNorm(in_features, features, 3, **options)
    self.conv2 = layers.ConvNorm(features, features, 3, **options)

  def __call__(self, x, train):
    return self.conv2(self.conv1(x, train), train)


class Decoder(layers.Block):
  """Five times: twice the size by nearest neighbours, the encoder's features of that stride behind, two convolutions.

  Stride 1 has no features to concatenate. A VGG's features, which end with a pooling, first pass two convolutions.

  Args:
    backbone: the encoder, at output stride 32.
    options: norm, dtype, rngs.
  """

  def __init__(self, backbone: base.Backbone, options):
    self.skips = tuple(backbone.pyramid[stride][0] for stride in (16, 8, 4, 2))
    widths = (*(backbone.pyramid[stride][1] for stride in (16, 8, 4, 2)), 0)
    below = backbone.features
    self.center = DoubleConv(below, below, options) if backbone.ends_pooled else None
    for n, (width, features) in enumerate(zip(widths, FEATURES), start=1):
      setattr(self, f"block{n}", DoubleConv(below + width, features, options))
      below = features

  def __call__(self, x: jax.Array, train: bool, endpoints: dict) -> jax.Array:
    """[B, H / 32, W / 32, in] -> [B, H, W, 16]; fills "decoder/block1", ..., and reads the encoder's end points."""
    x = x if self.center is None else self.center(x, train)
    for n in range(1, len(FEATURES) + 1):
      skips = [endpoints[self.skips[n - 1]]] if n <= len(self.skips) else []
      x = endpoints[f"decoder/block{n}"] = self._block(x, n, train, *skips)
    return x

  @layers.rematerialized
  def _block(self, x, n, train, *skips):
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return getattr(self, f"block{n}")(jnp.concatenate((x, *skips), axis=-1), train)
