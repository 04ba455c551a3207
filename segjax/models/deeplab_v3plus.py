"""DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611), as its authors' TensorFlow code computes it, number for number."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import aspp, auxiliary_head, backbones, base, layers, resize
from segjax.models.deeplab_details import DETAILS, Details, resolve

DEFAULT_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}  # By output stride.


def _atrous_rates(rates) -> tuple[int, ...] | None:
  """What the option `atrous_rates` gives; None: by output stride. ValueError where it gives no rates."""
  if rates == "auto" or tuple(rates or ()) == ("auto",):
    return None
  rates = tuple(rates or ())
  if not all(isinstance(rate, int) and rate >= 1 for rate in rates):
    raise ValueError(f'model.atrous_rates = {rates!r}: give whole numbers from 1, ("auto",), or () for none.')
  return rates


class Decoder(layers.Block):
  """Concatenates the encoder's output with features of stride 4 and refines them by 3x3 convolutions (section 4.1).

  Args:
    in_features, low_level_features: channels of the two inputs.
    separable: whether the 3x3 convolutions are depthwise separable.
    detail: align_corners, separable_norm, low_level_first, decoder_convs, head_features.
    options: norm, dtype, rngs.
  """

  reduced = 48  # Channels that the low-level features are cut down to (table 1).

  def __init__(self, in_features, low_level_features, *, separable, detail: Details, options):
    self.low_level = layers.ConvNorm(
      low_level_features, self.reduced, kernel_init=nnx.initializers.glorot_uniform(), **options
    )
    self.align_corners, self.low_level_first = detail.align_corners, detail.low_level_first
    self.convs = tuple(f"conv{n}" for n in range(1, detail.decoder_convs + 1))
    width = in_features + self.reduced
    for name in self.convs:
      conv = aspp.make_conv(
        width, detail.head_features, separable=separable, inner_norm=detail.separable_norm, options=options
      )
      setattr(self, name, conv)
      width = detail.head_features

  @layers.rematerialized
  def __call__(self, x: jax.Array, low_level: jax.Array, train: bool, endpoints: dict) -> jax.Array:
    """[B, h, w, in] and [B, H / 4, W / 4, low] -> [B, H / 4, W / 4, head_features]."""
    low_level = endpoints["decoder/low_level"] = self.low_level(low_level, train)
    x = resize.resize_bilinear(x, low_level.shape[1:3], self.align_corners)
    x = jnp.concatenate((low_level, x) if self.low_level_first else (x, low_level), axis=-1)
    endpoints["decoder/concat"] = x
    for name in self.convs:
      x = aspp.run_conv(getattr(self, name), x, train, endpoints, f"decoder/{name}")
    return x


class DeepLabV3Plus(base.Network):
  """DeepLabV3+ for images of any size.

  Args:
    num_classes: channels of the logits.
    backbone: one of `backbones.BACKBONES`.
    depth_multiplier: of a MobileNetV2's numbers of channels; officially 1.0 or 0.5.
    output_stride: of the encoder: 8, 16 or 32. It changes no parameter, so a model trained at 16 can run at 8.
    atrous_rates: of the ASPP branches, in pixels of the encoder's features. "auto" or ("auto",): by output stride, 3,6,9 at
      32, 6,12,18 at 16, 12,24,36 at 8. () or None: no atrous branches, as the released MobileNetV2 models have it.
    separable: depthwise separable convolutions in ASPP and decoder (section 3.1).
    image_pooling: the ASPP branch of the mean over all pixels. The paper's best Cityscapes rows go without (table 7).
    decoder: off: logits of the encoder's output, as DeepLabV3.
    multi_grid: factors of the rates in the last block of an Xception or ResNet (arXiv 1706.05587, section 3.2.1).
    dropout: rate after the ASPP.
    bn_momentum: of the running statistics. Official: 0.9997, and 0.997 in a MobileNetV2. Short runs need less, or the
      statistics of evaluation are still those of the start.
    frozen_bn: normalise by the running statistics in training too (fine-tuning with a small batch); scale and bias
      still learn.
    auxiliary: a second classifier, on the features before a ResNet's last block or a MobileNetV2's last of 96 channels,
      for a second loss in training. Its logits are the end point "auxiliary", of those features' size.
    details: fields of `deeplab_details.Details` that differ from the official code, for weights that were trained so.
    channels: of the image.
    dtype: of the computation.

  `coarsest_stride` is that of the encoder, `align_corners` the convention of all resizing.

  Differs from the paper: every detail that the paper leaves open is the official code's.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  def __init__(
    self,
    *,
    num_classes,
    backbone="xception_65",
    depth_multiplier=1.0,
    output_stride=16,
    atrous_rates=("auto",),
    separable=True,
    image_pooling=True,
    decoder=True,
    multi_grid=(1, 1, 1),
    dropout=0.1,
    bn_momentum=0.9997,
    frozen_bn=False,
    auxiliary=False,
    details: Mapping = DETAILS,
    channels=3,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    detail = resolve(details, backbone)
    base.check_share(dropout=dropout)
    rates = _atrous_rates(atrous_rates)
    self.backbone = backbones.build(
      backbone,
      depth_multiplier=depth_multiplier,
      output_stride=output_stride,
      multi_grid=multi_grid,
      detail=detail,
      bn_momentum=bn_momentum,
      frozen_bn=frozen_bn,
      auxiliary=auxiliary,
      channels=channels,
      dtype=dtype,
      rngs=rngs,
    )
    self.dtype, self.coarsest_stride, self.align_corners = dtype, output_stride, detail.align_corners
    self.normalization = self.backbone.normalization if detail.normalization == "auto" else detail.normalization
    self.mean = backbones.MEANS[self.normalization]
    norm = dict(momentum=bn_momentum, epsilon=aspp.HEAD_EPSILON, frozen=frozen_bn)
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    shared = dict(separable=separable, detail=detail, options=options)
    rates = DEFAULT_RATES[output_stride] if rates is None else rates
    self.aspp = aspp.ASPP(self.backbone.features, rates=rates, image_pooling=image_pooling, dropout=dropout, **shared)
    low_level = self.backbone.low_levels[self.backbone.low_level]
    self.decoder = Decoder(detail.head_features, low_level, **shared) if decoder else None
    small = nnx.initializers.truncated_normal(0.01)
    width = detail.head_features
    self.logits = layers.Conv(width, num_classes, 1, use_bias=True, kernel_init=small, dtype=dtype, rngs=rngs)
    head = auxiliary_head.AuxiliaryHead
    self.auxiliary = head(*self.backbone.auxiliary, num_classes, options=options) if auxiliary else None

  def normalize(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> float32 as the backbone wants it: in [-1, 1], a ResNet standardised."""
    return backbones.normalize(image, self.normalization)

  def scores(self, image, size, train, key, endpoints):
    """[B, H / 4, W / 4, num_classes] with the decoder, else H / output_stride, rounded up.

    End points are all named intermediate results: "aspp/branch1", "decoder/conv2", ...
    """
    endpoints["image"] = image
    x = self.backbone(image, train, endpoints)
    x = self.aspp(x, train, key, endpoints)
    if self.decoder is not None:
      x = self.decoder(x, endpoints[self.backbone.low_level], train, endpoints)
    if self.auxiliary is not None:
      self.auxiliary(train, key, endpoints)
    return self.logits(x)
