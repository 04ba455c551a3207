"""The fully convolutional network on a ResNet: a dilated backbone, one 3x3 convolution and a classifier.

Long, Shelhamer & Darrell 2015 (arXiv 1411.4038) on a backbone of output stride 8 (Yu & Koltun 2017, arXiv 1705.09914), a
common baseline, as torchvision and mmsegmentation have it. The FCN-8s of the paper is another network.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import auxiliary_head, backbones, base, layers
from segjax.models.deeplab_details import Details


class DilatedFCN(base.Network):
  """A dilated backbone, 3x3 convolution to a quarter of its channels, batch norm, ReLU, classifier; for any image size.

  Args:
    num_classes: channels of the logits.
    backbone: one of `backbones.BACKBONES`.
    output_stride: of the backbone: 8, 16 or 32.
    dropout: rate before the classifier.
    bn_momentum, frozen_bn: as of DeepLabV3Plus.
    auxiliary: a second classifier, as of DeepLabV3Plus.
    align_corners: convention of the resizing (`models/resize.py`).
    deep_stem: as `resnet_deep_stem` of `deeplab_details.Details`.
    concat_head: mmsegmentation's head: two 3x3 convolutions, and one over the features beside their result. Off: one.
    channels: of the image.
    dtype: of the computation.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  def __init__(
    self,
    *,
    num_classes,
    backbone="resnet_50",
    output_stride=8,
    dropout=0.1,
    bn_momentum=0.9,
    frozen_bn=False,
    auxiliary=False,
    align_corners=True,
    deep_stem=False,
    concat_head=False,
    channels=3,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    base.check_share(dropout=dropout)
    if deep_stem and not backbone.startswith("resnet"):
      raise ValueError(f"model.deep_stem = {deep_stem}: only a ResNet has one, {backbone} has not.")
    self.backbone = backbones.build(
      backbone,
      output_stride=output_stride,
      bn_momentum=bn_momentum,
      frozen_bn=frozen_bn,
      auxiliary=auxiliary,
      detail=Details(resnet_deep_stem=deep_stem),
      channels=channels,
      dtype=dtype,
      rngs=rngs,
    )
    options = dict(norm=dict(momentum=bn_momentum, frozen=frozen_bn), dtype=dtype, rngs=rngs)
    width = self.backbone.features // 4
    self.head = layers.ConvNorm(self.backbone.features, width, 3, **options)
    self.head2 = layers.ConvNorm(width, width, 3, **options) if concat_head else None
    self.head_concat = layers.ConvNorm(self.backbone.features + width, width, 3, **options) if concat_head else None
    self.logits = layers.Conv(width, num_classes, 1, use_bias=True, dtype=dtype, rngs=rngs)
    head = auxiliary_head.AuxiliaryHead
    self.auxiliary = head(*self.backbone.auxiliary, num_classes, options=options) if auxiliary else None
    self.dropout, self.dtype, self.coarsest_stride, self.align_corners = dropout, dtype, output_stride, align_corners
    self.mean = backbones.MEANS[self.backbone.normalization]

  def normalize(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> float32 as the backbone wants it."""
    return backbones.normalize(image, self.backbone.normalization)

  def scores(self, image, size, train, key, endpoints):
    """[B, H / output_stride, W / output_stride, num_classes], rounded up. End points are the backbone's."""
    features = self.backbone(image, train, endpoints)
    x = self.head(features, train)
    if self.head_concat is not None:
      x = self.head_concat(jnp.concatenate((features, self.head2(x, train)), axis=-1), train)
    x = layers.dropout(x, self.dropout, key if train else None)
    if self.auxiliary is not None:
      self.auxiliary(train, key, endpoints)
    return self.logits(x)
