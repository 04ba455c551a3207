"""U-Net (Ronneberger, Fischer & Brox 2015, arXiv 1505.04597), as published, and padded with batch norm, as mostly used."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import auxiliary_head, backbones, base, layers, resize, unet_decoder
from segjax.models.deeplab_details import Details

# PyTorch's MobileNetV2, whose weights the encoders have.
TORCH_MOBILENET = Details(
  mobilenet_padding="fixed", mobilenet_epsilon=1e-5, mobilenet_last_conv=True, normalization="imagenet"
)
# What an encoder leaves no choice of.
CLASSIC = dict(width=64, depth=4, up="transposed", padding="same", batch_norm=True, head_conv=False, auxiliary=False)


class DoubleConv(nnx.Module):
  """Twice 3x3 convolution, batch norm unless it is off, ReLU: a level of the U-Net (figure 1)."""

  def __init__(self, in_features, mid_features, out_features, *, padding, batch_norm, bn_momentum, dtype, rngs):
    options = dict(padding=padding, use_bias=not batch_norm, dtype=dtype, rngs=rngs)
    self.conv1 = layers.Conv(in_features, mid_features, **options)
    self.norm1 = layers.BatchNorm(mid_features, momentum=bn_momentum, dtype=dtype) if batch_norm else None
    self.conv2 = layers.Conv(mid_features, out_features, **options)
    self.norm2 = layers.BatchNorm(out_features, momentum=bn_momentum, dtype=dtype) if batch_norm else None

  def __call__(self, x, train):
    for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
      x = conv(x)
      x = jax.nn.relu(x) if norm is None else norm(x, train, jax.nn.relu)
    return x


class UNet(base.Network):
  """U-Net for images of any size.

  Args:
    num_classes: channels of the logits.
    width: channels at full resolution; they double at each level (the paper: 64).
    depth: number of 2x2 poolings (the paper: 4).
    up: "transposed" convolution, as in the paper; "bilinear" resizing, whose bottleneck is half as wide; or
      "bilinear_conv": resizing with half-pixel centres, 1x1 convolution, batch norm and ReLU, as mmsegmentation's.
    dropout: rate at the end of the contracting path (section 3.1; its code uses 0.5).
    padding: "same": zeros around each convolution. "valid", as in the paper: none, so that a logit depends on real
      pixels only; skips are cropped, and `margin` pixels around the image are needed (section 2, figure 2).
    batch_norm: before each ReLU; the paper has none.
    bn_momentum: of the running statistics.
    encoder: "none": the contracting path is the paper's. One of `backbones.BACKBONES`: it is that backbone, to be trained
      on ImageNet first, and the expanding path that of segmentation_models_pytorch (`unet_decoder`): 256, 128, 64, 32, 16
      channels, nearest neighbours, 3x3 convolution to the logits. Of the options here, `dropout` and `bn_momentum` then
      act, and all others keep their defaults.
    head_conv: a 3x3 convolution, batch norm and ReLU before the logits, as mmsegmentation's.
    auxiliary: a second classifier, on the features of stride 2 ("up1"), for a second loss in training.
    channels: of the image.
    dtype: of the computation.

  As published: padding="valid", batch_norm=False, dropout=0.5.

  Attributes:
    margin: pixels that `padding` "valid" takes off each side; 92 for depth 4 (572 -> 388). 0 for "same".

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  mean = layers.IMAGENET_MEAN  # The raw pixel that pads crops; `preprocess` maps it to 0.

  def __init__(
    self,
    *,
    num_classes,
    width=64,
    depth=4,
    up="transposed",
    dropout=0.0,
    padding="same",
    batch_norm=True,
    bn_momentum=0.9,
    encoder="none",
    head_conv=False,
    auxiliary=False,
    channels=3,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if up not in ("transposed", "bilinear", "bilinear_conv"):
      raise ValueError(f"model.up = {up!r}: choose transposed, bilinear or bilinear_conv.")
    if padding not in ("same", "valid"):
      raise ValueError(f"model.padding = {padding!r}: choose same or valid.")
    if padding == "valid" and up != "transposed":
      raise ValueError(
        f"model.up = {up!r}: resizing depends on the feature map's size, so unpadded tiles would not fit together; set it"
        " to transposed, or model.padding to same."
      )
    if depth < 1 or width < 1:
      raise ValueError(f"model.depth = {depth} and model.width = {width} must be at least 1.")
    if not batch_norm and (up == "bilinear_conv" or head_conv or auxiliary):
      raise ValueError("model.batch_norm = False: up = bilinear_conv, head_conv and auxiliary have batch norm.")
    if auxiliary and (depth < 2 or padding == "valid"):
      raise ValueError("model.auxiliary = True: set model.depth to 2 or more, and model.padding to same.")
    base.check_share(dropout=dropout, bn_momentum=bn_momentum)
    self.up, self.dropout, self.dtype, self.padding = up, dropout, dtype, padding
    self.depth = depth if encoder == "none" else 5
    self.coarsest_stride = 2**self.depth
    self.align_corners = up != "bilinear_conv"
    self.margin = 6 * 2**depth - 4 if padding == "valid" else 0
    if encoder != "none":
      given = dict(
        width=width,
        depth=depth,
        up=up,
        padding=padding,
        batch_norm=batch_norm,
        head_conv=head_conv,
        auxiliary=auxiliary,
      )
      for name in (name for name in CLASSIC if given[name] != CLASSIC[name]):
        raise ValueError(
          f"model.{name} = {given[name]!r}: a U-Net on an encoder has none, leave it at {CLASSIC[name]!r}, or set"
          ' model.encoder to "none".'
        )
      self._on_encoder(encoder, num_classes, bn_momentum, dict(channels=channels, dtype=dtype, rngs=rngs))
    else:
      options = dict(padding=padding, batch_norm=batch_norm, bn_momentum=bn_momentum, dtype=dtype, rngs=rngs)
      self._classic(width, channels, options)
      self._heads(num_classes, width, head_conv, auxiliary, bn_momentum, dict(dtype=dtype, rngs=rngs))

  def _on_encoder(self, encoder, num_classes, bn_momentum, options):
    if encoder not in backbones.BACKBONES:
      raise ValueError(f"model.encoder = {encoder!r}: choose one of none, {', '.join(backbones.BACKBONES)}.")
    detail = TORCH_MOBILENET if encoder == "mobilenet_v2" else backbones.OFFICIAL
    self.backbone = backbones.build(
      encoder, output_stride=32, detail=detail, bn_momentum=bn_momentum, frozen_bn=False, **options
    )
    self.normalization = self.backbone.normalization if detail.normalization == "auto" else detail.normalization
    self.mean = backbones.MEANS[self.normalization]
    del options["channels"]
    self.decoder = unet_decoder.Decoder(self.backbone, dict(norm=dict(momentum=bn_momentum), **options))
    self.logits = layers.Conv(unet_decoder.FEATURES[-1], num_classes, use_bias=True, **options)

  def _classic(self, width, channels, options):
    self.backbone, self.normalization = None, "imagenet"
    depth, up, dtype, rngs = self.depth, self.up, options["dtype"], options["rngs"]
    features = [width * 2**level for level in range(depth + 1)]
    if up == "bilinear":
      features[-1] //= 2  # Resizing keeps the channels, so that what is concatenated is as wide as with "transposed".

    self.down0 = DoubleConv(channels, width, width, **options)
    for level in range(1, depth + 1):
      setattr(self, f"down{level}", DoubleConv(features[level - 1], features[level], features[level], **options))
    below = features[-1]
    for level in reversed(range(depth)):
      mid = out = features[level]
      if up == "transposed":
        setattr(self, f"upconv{level}", layers.ConvTranspose2x2(below, mid, dtype=dtype, rngs=rngs))
      elif up == "bilinear_conv":
        norm = dict(momentum=options["bn_momentum"])
        setattr(self, f"upconv{level}", layers.ConvNorm(below, mid, norm=norm, dtype=dtype, rngs=rngs))
      else:
        out = features[level - 1] if level else width
      setattr(self, f"up{level}", DoubleConv(2 * mid, mid, out, **options))
      below = out

  def _heads(self, num_classes, width, head_conv, auxiliary, bn_momentum, options):
    normed = dict(norm=dict(momentum=bn_momentum), **options)
    self.head = layers.ConvNorm(width, width, 3, **normed) if head_conv else None
    self.logits = layers.Conv(width, num_classes, 1, use_bias=True, **options)
    head = auxiliary_head.AuxiliaryHead
    self.auxiliary = head("up1", 2 * width, width, num_classes, options=normed) if auxiliary else None

  def normalize(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> float, zero mean and unit variance over ImageNet; an encoder as it wants it."""
    return backbones.normalize(image, self.normalization)

  def scores(self, image, size, train, key, endpoints):
    """Under "same", sizes that 2^depth does not divide are zero-padded at the bottom and right, and the logits cropped
    back, so that skips always meet features of their own size. Under "valid" the image is mirrored around its edges.

    End points are "down0", "down1", ... and "up0", ...; or the encoder's and "decoder/block1", ....
    """
    if self.padding == "same":
      x = layers.pad_to_multiple(image, 2**self.depth)
    else:
      before = (size[0] + 2 * self.margin - image.shape[1]) // 2  # 0 where the image has its margin already.
      x = resize.mirror(image, before, tuple(self.unpadded_size(n) for n in size))
    if self.backbone is not None:
      x = layers.dropout(self.backbone(x, train, endpoints), self.dropout, key if train else None)
      return self.logits(self.decoder(x, train, endpoints))[:, : size[0], : size[1]]
    skips = []
    for level in range(self.depth + 1):
      x = endpoints[f"down{level}"] = self._descend(x, level, train)  # [B, H/2^level, W/2^level, width*2^level]
      skips.append(x)
    x = layers.dropout(x, self.dropout, key if train else None)
    for level in reversed(range(self.depth)):
      x = endpoints[f"up{level}"] = self._ascend(x, skips[level], level, train)  # [B, H/2^level, ...]
    if self.auxiliary is not None:
      self.auxiliary(train, key, endpoints)
      endpoints["auxiliary"] = endpoints["auxiliary"][:, : -(-size[0] // 2), : -(-size[1] // 2)]
    x = x if self.head is None else self.head(x, train)
    return self.logits(x)[:, : size[0], : size[1]]

  @layers.rematerialized
  def _descend(self, x, level, train):
    return getattr(self, f"down{level}")(layers.max_pool_2x2(x) if level else x, train)

  @layers.rematerialized
  def _ascend(self, x, skip, level, train):
    if self.up == "transposed":
      x = getattr(self, f"upconv{level}")(x)
    else:
      x = resize.resize_bilinear(x, skip.shape[1:3], self.align_corners)
    if self.up == "bilinear_conv":
      x = getattr(self, f"upconv{level}")(x, train)
    cut = [(n - m) // 2 for n, m in zip(skip.shape[1:3], x.shape[1:3])]  # 0 under "same".
    skip = skip[:, cut[0] : cut[0] + x.shape[1], cut[1] : cut[1] + x.shape[2]]
    return getattr(self, f"up{level}")(jnp.concatenate([skip, x], axis=-1), train)

  def unpadded_size(self, size: int) -> int:
    """Input pixels along one axis for at least `size` logits under "valid", such that every pooling sees an even size."""
    return -(-max(size - 4, 0) // self.coarsest_stride) * self.coarsest_stride + 4 + 2 * self.margin
