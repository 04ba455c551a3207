"""The fully convolutional network in its ResNet form: a dilated backbone, one 3x3 convolution and a classifier.

Long, Shelhamer & Darrell 2015 (arXiv 1411.4038) on a backbone of output stride 8 (Yu & Koltun 2017, arXiv 1705.09914), a
common baseline, as torchvision has it. The FCN-8s of the paper is another network.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import backbones, layers, resize


class AuxiliaryHead(nnx.Module):
  """A second classifier on inner features, whose loss helps in training (Zhao et al. 2017, arXiv 1612.01105, section 3.3).

  3x3 convolution to a quarter of the channels, batch norm, ReLU, dropout of 0.1, 1x1 convolution to the classes.

  Args:
    options: norm, dtype, rngs.
  """

  def __init__(self, in_features, num_classes, *, options):
    width, rest = in_features // 4, {k: v for k, v in options.items() if k != "norm"}
    self.conv = layers.ConvNorm(in_features, width, 3, **options)
    self.logits = layers.Conv(width, num_classes, 1, use_bias=True, **rest)

  def __call__(self, x: jax.Array, train: bool, key: jax.Array | None) -> jax.Array:
    """[B, h, w, in] -> logits [B, h, w, num_classes], float32 (float64 under float64)."""
    key = jax.random.fold_in(key, 1) if train and key is not None else None  # Not the main classifier's.
    x = layers.dropout(self.conv(x, train), 0.1, key)
    return self.logits(x).astype(layers.param_dtype(self.logits.dtype))


class DilatedFCN(nnx.Module):
  """A dilated backbone, 3x3 convolution to a quarter of its channels, batch norm, ReLU, classifier; for any image size.

  Args:
    num_classes: channels of the logits.
    backbone: one of `backbones.NAMES`.
    output_stride: of the backbone: 8, 16 or 32.
    dropout: rate before the classifier.
    bn_momentum, frozen_bn: as of DeepLabV3Plus.
    auxiliary: a second classifier, as of DeepLabV3Plus.
    align_corners: convention of the resizing (`models/resize.py`).
    dtype: of the computation.

  `mean`, `stride` and `align_corners` as of DeepLabV3Plus.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  border = 0

  def __init__(self, *, num_classes, backbone="resnet_50", output_stride=8, dropout=0.1, bn_momentum=0.9,
               frozen_bn=False, auxiliary=False, align_corners=True, dtype=jnp.float32, rngs: nnx.Rngs):  # fmt: skip
    if not 0 <= dropout < 1:
      raise ValueError(f"model.dropout = {dropout} must lie in [0, 1).")
    backbones.check_auxiliary(auxiliary, backbone)
    self.backbone = backbones.build(
      backbone, output_stride=output_stride, bn_momentum=bn_momentum, frozen_bn=frozen_bn, dtype=dtype, rngs=rngs
    )
    options = dict(norm=dict(momentum=bn_momentum, frozen=frozen_bn), dtype=dtype, rngs=rngs)
    width = self.backbone.features // 4
    self.head = layers.ConvNorm(self.backbone.features, width, 3, **options)
    self.logits = layers.Conv(width, num_classes, 1, use_bias=True, dtype=dtype, rngs=rngs)
    self.auxiliary = (
      AuxiliaryHead(self.backbone.auxiliary_features, num_classes, options=options) if auxiliary else None
    )
    self.dropout, self.dtype, self.stride, self.align_corners = dropout, dtype, output_stride, align_corners
    self.normalization = backbones.normalization(backbone)
    self.mean = backbones.MEANS[self.normalization]

  def preprocess(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> float32 as the backbone wants it."""
    return backbones.normalize(image, self.normalization)

  def __call__(self, image: jax.Array, train: bool = False, key: jax.Array | None = None, *, upsample: bool = True,
               endpoints: dict | None = None) -> jax.Array:  # fmt: skip
    """Preprocessed image [B, H, W, 3] -> logits [B, H, W, num_classes], float32 (float64 under float64).

    Args:
      train: batch statistics instead of running ones, and dropout.
      key: for dropout; without it there is none.
      upsample: whether logits are resized to the image's size. Off: H / output_stride, rounded up.
      endpoints: filled with the backbone's named results, "logits" and "auxiliary" at the backbone's size.
    """
    endpoints = {} if endpoints is None else endpoints
    x = self.backbone(image.astype(self.dtype), train, endpoints)
    x = layers.dropout(self.head(x, train), self.dropout, key if train else None)
    logits = endpoints["logits"] = self.logits(x).astype(layers.param_dtype(self.dtype))
    if self.auxiliary is not None:
      endpoints["auxiliary"] = self.auxiliary(endpoints[self.backbone.auxiliary], train, key)
    return resize.resize_bilinear(logits, image.shape[1:3], self.align_corners) if upsample else logits
