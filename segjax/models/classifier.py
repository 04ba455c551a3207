"""Image classifiers: what the weights of most backbones were first trained as."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import backbones, layers
from segjax.models.backbones import mobilenet_v2


class Logits(layers.Conv):
  """The linear layer as a 1x1 convolution, and what has to come before the mean that it is given.

  Args:
    wide: channels of a 1x1 convolution there, with batch norm and ReLU6; 0 for none.
    norm: keywords of that `BatchNorm`.
  """

  def __init__(self, in_features, num_classes, *, wide, norm: dict, dtype, rngs: nnx.Rngs):
    super().__init__(wide or in_features, num_classes, 1, use_bias=True, dtype=dtype, rngs=rngs)
    relu6 = dict(activation=jax.nn.relu6, norm=norm)
    self.wide = layers.ConvNorm(in_features, wide, dtype=dtype, rngs=rngs, **relu6) if wide else None


class Classifier(nnx.Module):
  """A backbone, the mean over the map, and a linear layer. A MobileNetV2 has its last convolution before the mean.

  Its parameters are called as in the segmentation networks, `backbone/...` and `logits/...`, so the same weights fit
  those, less `logits`.

  Args:
    num_classes: channels of the logits.
    backbone: one of `backbones.CLASSIFIERS`. The fully connected layers of "vgg_16" see every 7x7 pixels of its map; the
      mean over these places is the paper's dense evaluation (arXiv 1409.1556, section 3.2).
    output_stride: 8, 16 or 32; it changes no parameter. A VGG has 32.
    bn_momentum, frozen_bn: of batch norm; a VGG has none.
    dtype: of the computation.

  `mean` is the raw pixel that `preprocess` maps to 0.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  def __init__(self, *, num_classes, backbone, output_stride=32, bn_momentum=0.9, frozen_bn=False, dtype=jnp.float32,
               rngs: nnx.Rngs):  # fmt: skip
    if backbone not in backbones.CLASSIFIERS:
      raise ValueError(f"model.backbone = {backbone!r}: choose one of {', '.join(backbones.CLASSIFIERS)}.")
    self.backbone = backbones.CLASSIFIERS[backbone](
      output_stride=output_stride, bn_momentum=bn_momentum, frozen_bn=frozen_bn, dtype=dtype, rngs=rngs
    )
    norm = dict(momentum=bn_momentum, epsilon=backbones.OFFICIAL.mobilenet_epsilon, frozen=frozen_bn)
    wide = mobilenet_v2.LAST if backbone == "mobilenet_v2" else 0
    self.logits = Logits(self.backbone.features, num_classes, wide=wide, norm=norm, dtype=dtype, rngs=rngs)
    self.dtype = dtype
    self.mean = backbones.MEANS[self.backbone.normalization]

  def preprocess(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> float32 as the backbone wants it."""
    return backbones.normalize(image, self.backbone.normalization)

  def __call__(self, image: jax.Array, train: bool = False, key: jax.Array | None = None, *,
               endpoints: dict | None = None) -> jax.Array:  # fmt: skip
    """Preprocessed image [B, H, W, 3] -> logits [B, num_classes], float32 (float64 under float64).

    Args:
      train: batch statistics instead of running ones, and a VGG's dropout.
      key: for dropout; without it there is none.
      endpoints: filled with the backbone's named results.
    """
    endpoints = {} if endpoints is None else endpoints
    x = self.backbone(image.astype(self.dtype), train, endpoints, key)
    x = x if self.logits.wide is None else self.logits.wide(x, train)
    return self.logits(x.mean((1, 2), keepdims=True))[:, 0, 0].astype(layers.param_dtype(self.dtype))
