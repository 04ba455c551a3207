"""VGG-16 (Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, D) with its fully connected layers as convolutions.

A 7x7 convolution slides the classifier over images of any size (Shelhamer et al. 2017, arXiv 1605.06211, section 3.1).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers

# Convolutions per stage, and their channels as multiples of the width; a 2x2 pooling follows each stage.
STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


class VGG16(layers.Block):
  """conv1_1 ... conv5_3, fc6 and fc7, without the classifier; a ReLU after each.

  Args:
    width: channels of conv1_1 (the paper: 64); all others keep their ratio to it, fc6 and fc7 64 times as many.
    dropout: rate after fc6 and after fc7.
    fc6_padding: "same": one result per pixel of pool5, the one in the middle of 7x7 pixels being the fully connected
      layer's. "valid": only where all 7x7 pixels are there (Caffe's FCN).
    channels: of the image.

  `features` is the number of channels of fc7, and `pool_features` those of pool1 ... pool5 by name.
  """

  normalization = "imagenet"

  def __init__(self, *, width=64, dropout=0.5, fc6_padding="same", channels=3, dtype=jnp.float32, rngs: nnx.Rngs):
    options = dict(use_bias=True, dtype=dtype, rngs=rngs)
    self.dropout, self.dtype, self.features = dropout, dtype, 64 * width
    self.pool_features = {f"pool{stage}": factor * width for stage, (_, factor) in enumerate(STAGES, start=1)}
    self.stages = tuple(
      tuple(f"conv{stage}_{n}" for n in range(1, count + 1)) for stage, (count, _) in enumerate(STAGES, start=1)
    )
    below = channels
    for names, (_, factor) in zip(self.stages, STAGES):
      for name in names:
        setattr(self, name, layers.Conv(below, factor * width, **options))
        below = factor * width
    self.fc6 = layers.Conv(below, self.features, 7, padding=fc6_padding, **options)
    self.fc7 = layers.Conv(self.features, self.features, 1, **options)

  def __call__(
    self, image: jax.Array, train: bool = False, endpoints: dict | None = None, key: jax.Array | None = None
  ) -> jax.Array:
    """Preprocessed image [B, H, W, 3] -> fc7 [B, h, w, 64 width].

    h and w are H / 32 and W / 32, rounded up at each pooling; 6 less with fc6_padding "valid".

    Args:
      train, key: dropout in training, if there is a key.
      endpoints: filled with pool1 ... pool5, fc6 and fc7.
    """
    endpoints = {} if endpoints is None else endpoints
    fc6_key, fc7_key = (None, None) if key is None or not train else jax.random.split(key)
    x = image.astype(self.dtype)
    for stage, names in enumerate(self.stages, start=1):
      x = endpoints[f"pool{stage}"] = self._stage(x, names)
    x = endpoints["fc6"] = jax.nn.relu(self.fc6(x))
    x = endpoints["fc7"] = jax.nn.relu(self.fc7(layers.dropout(x, self.dropout, fc6_key)))
    return layers.dropout(x, self.dropout, fc7_key)

  @layers.rematerialized
  def _stage(self, x, names):
    for name in names:
      x = jax.nn.relu(getattr(self, name)(x))
    return layers.max_pool_2x2(x, ceil_mode=True)


def vgg_classifier(*, output_stride: int, bn_momentum: float, frozen_bn: bool, dtype, rngs: nnx.Rngs) -> VGG16:
  """The VGG-16 of an image classifier, whose fc6 sees every 7x7 pixels of pool5; it has no batch norm.

  Raises:
    ValueError: another output stride than 32.
  """
  if output_stride != 32:
    raise ValueError(f"model.output_stride = {output_stride!r}: vgg_16 has 32.")
  return VGG16(fc6_padding="valid", dtype=dtype, rngs=rngs)
