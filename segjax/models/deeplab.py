"""DeepLabV3+ (Chen et al. 2018, arXiv 1802.02611), as its authors' TensorFlow code computes it, number for number."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers, mobilenet_v2, resize, xception
from segjax.models.aspp import ASPP, HEAD_EPSILON, SEPARABLE_INIT

BACKBONES = ("xception_41", "xception_65", "xception_71", "mobilenet_v2")
DEFAULT_RATES = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}  # By output stride.


class Decoder(nnx.Module):
  """Joins the encoder's output with features of stride 4 and refines them by two 3x3 convolutions (section 4.1).

  Args:
    in_features, low_level_features: channels of the two inputs.
    separable: whether the two convolutions are depthwise separable.
    options: norm, dtype, rngs.
  """

  features = 256
  reduced = 48  # Channels that the low-level features are cut down to (table 1).

  def __init__(self, in_features, low_level_features, *, separable, options):
    dense = dict(kernel_init=nnx.initializers.glorot_uniform(), **options)
    self.low_level = layers.ConvNorm(low_level_features, self.reduced, **dense)
    self.separable = separable
    for n, width in ((1, in_features + self.reduced), (2, self.features)):
      if separable:
        conv = layers.SeparableConv(width, self.features, **SEPARABLE_INIT, **options)
      else:
        conv = layers.ConvNorm(width, self.features, 3, **dense)
      setattr(self, f"conv{n}", conv)

  def __call__(self, x: jax.Array, low_level: jax.Array, train: bool, endpoints: dict) -> jax.Array:
    """[B, h, w, in] and [B, H / 4, W / 4, low] -> [B, H / 4, W / 4, 256]."""
    low_level = endpoints["decoder/low_level"] = self.low_level(low_level, train)
    x = resize.resize_bilinear(x, low_level.shape[1:3])
    x = endpoints["decoder/concat"] = jnp.concatenate([x, low_level], axis=-1)
    for n in (1, 2):
      conv, name = getattr(self, f"conv{n}"), f"decoder/conv{n}"
      x = endpoints[name] = conv(x, train, endpoints, name) if self.separable else conv(x, train)
    return x


class DeepLabV3Plus(nnx.Module):
  """DeepLabV3+ for images of any size.

  Args:
    num_classes: channels of the logits.
    backbone: one of `BACKBONES`.
    output_stride: of the encoder: 8, 16 or 32. It changes no parameter, so a model trained at 16 can run at 8.
    atrous_rates: of the ASPP branches, in pixels of the encoder's map. "auto" or ("auto",): by output stride, 3,6,9 at
      32, 6,12,18 at 16, 12,24,36 at 8. () or None: no atrous branches, as the released MobileNetV2 models have it.
    separable: depthwise separable convolutions in ASPP and decoder (section 3.1).
    image_pooling: the ASPP branch of the whole map's mean. The paper's best Cityscapes rows go without (table 7).
    decoder: off: logits of the encoder's output, as DeepLabV3.
    multi_grid: factors of the rates in the last block of an Xception (arXiv 1706.05587, section 3.2.1).
    dropout: rate after the ASPP.
    bn_momentum: of the running statistics. Official: 0.9997, and 0.997 in a MobileNetV2. Short runs need less, or the
      statistics of evaluation are still those of the start.
    frozen_bn: normalise by the running statistics in training too (fine-tuning with a small batch); scale and bias
      still learn.
    dtype: of the computation.

  Differs from the paper: every detail that the paper leaves open is the official code's.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  mean = (127.5, 127.5, 127.5)  # The raw pixel that pads crops; `preprocess` maps it to 0.
  border = 0
  align_corners = True

  def __init__(self, *, num_classes, backbone="xception_65", output_stride=16, atrous_rates=("auto",), separable=True,
               image_pooling=True, decoder=True, multi_grid=(1, 1, 1), dropout=0.1, bn_momentum=0.9997,
               frozen_bn=False, dtype=jnp.float32, rngs: nnx.Rngs):  # fmt: skip
    if backbone not in BACKBONES:
      raise ValueError(f"model.backbone = {backbone!r}: choose one of {', '.join(BACKBONES)}.")
    if output_stride not in DEFAULT_RATES:
      raise ValueError(f"model.output_stride = {output_stride!r}: choose 8, 16 or 32.")
    if atrous_rates == "auto" or tuple(atrous_rates or ()) == ("auto",):
      atrous_rates = DEFAULT_RATES[output_stride]
    atrous_rates = tuple(atrous_rates or ())
    if not all(isinstance(rate, int) and rate >= 1 for rate in atrous_rates):
      raise ValueError(f'model.atrous_rates = {atrous_rates!r}: give whole numbers from 1, ("auto",), or () for none.')
    if len(multi_grid) != 3 or not all(isinstance(factor, int) and factor >= 1 for factor in multi_grid):
      raise ValueError(
        f"model.multi_grid = {tuple(multi_grid)!r}: give three whole numbers from 1, one per convolution."
      )
    if backbone == "mobilenet_v2" and tuple(multi_grid) != (1, 1, 1):
      raise ValueError(f"model.multi_grid = {tuple(multi_grid)!r}: mobilenet_v2 has none, leave it at (1, 1, 1).")
    if not 0 <= dropout < 1:
      raise ValueError(f"model.dropout = {dropout} must lie in [0, 1).")
    if not 0 <= bn_momentum < 1:
      raise ValueError(f"model.bn_momentum = {bn_momentum} must lie in [0, 1).")
    self.dtype, self.stride = dtype, output_stride
    common = dict(output_stride=output_stride, bn_momentum=bn_momentum, frozen_bn=frozen_bn, dtype=dtype, rngs=rngs)
    if backbone == "mobilenet_v2":
      self.backbone = mobilenet_v2.MobileNetV2(**common)
    else:
      self.backbone = xception.Xception(int(backbone.removeprefix("xception_")), multi_grid=multi_grid, **common)
    norm = dict(momentum=bn_momentum, epsilon=HEAD_EPSILON, frozen=frozen_bn)
    options = dict(norm=norm, dtype=dtype, rngs=rngs)
    self.aspp = ASPP(
      self.backbone.features, rates=atrous_rates, separable=separable, image_pooling=image_pooling, dropout=dropout,
      options=options,
    )  # fmt: skip
    self.decodes = decoder
    if decoder:
      self.decoder = Decoder(
        ASPP.features, self.backbone.low_level_features, separable=separable, options=options
      )  # fmt: skip
    self.logits = layers.Conv(
      Decoder.features if decoder else ASPP.features, num_classes, 1, use_bias=True,
      kernel_init=nnx.initializers.truncated_normal(0.01), dtype=dtype, rngs=rngs,
    )  # fmt: skip

  def preprocess(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> [-1, 1], float32."""
    return jnp.float32(2 / 255) * jnp.asarray(image).astype(jnp.float32) - 1

  def __call__(self, image: jax.Array, train: bool = False, key: jax.Array | None = None, *, upsample: bool = True,
               endpoints: dict | None = None) -> jax.Array:  # fmt: skip
    """Preprocessed image [B, H, W, 3] -> logits [B, H, W, num_classes], float32 (float64 under float64).

    Args:
      train: batch statistics instead of running ones, and dropout.
      key: for dropout; without it there is none.
      upsample: whether logits are resized to the image's size. Off: [B, H / 4, W / 4, num_classes] with the decoder,
        else H / output_stride, rounded up.
      endpoints: filled with every named intermediate result: "aspp/branch1", "decoder/conv2", ...
    """
    endpoints = {} if endpoints is None else endpoints
    endpoints["image"] = image
    x = self.backbone(image.astype(self.dtype), train, endpoints)
    x = self.aspp(x, train, key, endpoints)
    if self.decodes:
      x = self.decoder(x, endpoints[self.backbone.low_level], train, endpoints)
    logits = endpoints["logits"] = self.logits(x).astype(layers.param_dtype(self.dtype))
    return resize.resize_bilinear(logits, image.shape[1:3]) if upsample else logits
