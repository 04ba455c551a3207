"""FCN-32s, 16s and 8s (Long et al. 2015; Shelhamer et al. 2017, arXiv 1605.06211) on VGG-16."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import base, layers, resize
from segjax.models.backbones import vgg

# Mean of ImageNet's training images as Caffe's VGG-16 subtracts it, RGB in [0, 255]; nothing is divided.
CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)
# With padding 100: where the scores of pool4 and pool3 are cropped, and the result, by stride (section 4.1, footnote
# and the published networks). Each follows from the sizes before it, so that receptive fields meet.
CAFFE_CROPS = {"pool4": 5, "pool3": 9}
CAFFE_LAST_CROP = {32: 19, 16: 27, 8: 31}
AT_ONCE = {"pool4": 0.01, "pool3": 0.0001}  # Brings the skips' activations to the size of fc7's.
SKIPS = {32: (), 16: ("pool4",), 8: ("pool4", "pool3")}  # By stride, in the order they are fused.


class FCN(base.Network):
  """Scores of fc7, upsampled and added to those of pool4 and pool3, upsampled to the image. Images of any size.

  Args:
    num_classes: channels of the logits.
    stride: of the finest scores: 32 (no skips), 16 (pool4) or 8 (pool4, pool3).
    width: channels of VGG's first layer (the paper: 64); the others keep their ratio to it.
    fuse: "score": pool4 and pool3 are scored by 1x1 convolutions, and scores are added (section 4.1). "features": fc7's
      scores are brought to the channels of pool4, then of pool3, and these are added as they are, as in the widespread
      tutorial of KITTI's road.
    upsampling: which transposed convolutions learn, all beginning as bilinear interpolation: "learned" (all),
      "last_fixed" (all but the one to the image, as in the paper) or "fixed" (none).
    at_once: scales pool4 by 0.01 and pool3 by 0.0001, so that all strides can be trained together (section 4.2);
      otherwise train 32, 16 and 8 in turn, each from the one before (`config.init`).
    geometry: "same": zeros around each convolution, upsampling centred. "caffe": padding 100, no other in fc6, and the
      published crops.
    normalization: "imagenet": mean and deviation, as torchvision's weights expect. "caffe": the mean only.
    dropout: rate after fc6 and fc7.
    channels: of the image.

  Layers are called `score_fc7`, `score_pool4`, `score_pool3`, and `upscore_fc7`, `upscore_pool4` (from stride 32 to 16
  to 8), `upscore` (to the image). Score layers begin with zeros (section 4.3), those of "features" with
  small random numbers, since zeros would stop all gradients there.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """

  coarsest_stride = 32
  # `align_corners` is of resized views; its own upsampling is half-pixel centred.

  def __init__(
    self,
    *,
    num_classes,
    stride=8,
    width=64,
    fuse="score",
    upsampling="learned",
    at_once=False,
    geometry="same",
    normalization="imagenet",
    dropout=0.5,
    channels=3,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if stride not in SKIPS:
      raise ValueError(f"model.stride = {stride!r}: choose 32, 16 or 8.")
    if width < 1:
      raise ValueError(f"model.width = {width} must be at least 1.")
    for name, value, choices in (
      ("fuse", fuse, ("score", "features")),
      ("upsampling", upsampling, ("learned", "last_fixed", "fixed")),
      ("geometry", geometry, ("same", "caffe")),
      ("normalization", normalization, ("imagenet", "caffe")),
    ):
      if value not in choices:
        raise ValueError(f"model.{name} = {value!r}: choose one of {', '.join(choices)}.")
    if fuse == "features" and upsampling != "learned":
      raise ValueError(
        f"model.upsampling = {upsampling!r}: with model.fuse = 'features' it changes the number of channels, which"
        " interpolation cannot; set it to learned."
      )
    base.check_share(dropout=dropout)
    self.score_stride, self.fuse, self.at_once, self.geometry, self.dtype = stride, fuse, at_once, geometry, dtype
    self.mean = layers.IMAGENET_MEAN if normalization == "imagenet" else CAFFE_MEAN  # Pads crops; becomes 0.
    self.deviation = layers.IMAGENET_STD if normalization == "imagenet" else (1.0, 1.0, 1.0)
    self.skips = SKIPS[stride]
    options = dict(dtype=dtype, rngs=rngs)
    self.backbone = vgg.VGG16(
      channels=channels, width=width, dropout=dropout, fc6_padding="valid" if geometry == "caffe" else "same", **options
    )
    small = nnx.initializers.truncated_normal(0.01)
    scored = dict(use_bias=True, kernel_init=nnx.initializers.zeros if fuse == "score" else small, **options)
    bilinear = None if fuse == "score" else small
    self.score_fc7 = layers.Conv(self.backbone.features, num_classes, 1, **scored)
    below = num_classes
    for source, skip in zip(("fc7", "pool4"), self.skips):
      features = self.backbone.pool_features[skip]
      if fuse == "score":
        setattr(self, f"score_{skip}", layers.Conv(features, num_classes, 1, **scored))
        features = num_classes
      fixed = upsampling == "fixed"
      up = None if fixed else layers.ConvTranspose(below, features, 2, kernel_init=bilinear, **options)
      setattr(self, f"upscore_{source}", up)
      below = features
    fixed = upsampling != "learned"
    self.upscore = None if fixed else layers.ConvTranspose(below, num_classes, stride, kernel_init=bilinear, **options)

  def normalize(self, image: jax.Array) -> jax.Array:
    """Raw RGB in [0, 255], [B, H, W, 3] -> float, zero mean over ImageNet; see `normalization`."""
    return layers.standardize(image, self.mean, self.deviation)

  def scores(self, image, size, train, key, endpoints):
    """The upsampling to the image's size is a layer of the network itself.

    End points are all named intermediate results: "pool3", "score_pool3", "fuse_pool3", ...
    """
    caffe = self.geometry == "caffe"
    x = jnp.pad(image, ((0, 0), (99, 99), (99, 99), (0, 0))) if caffe else image  # conv1_1 adds the hundredth.
    x = endpoints["score_fc7"] = self.score_fc7(self.backbone(x, train, endpoints, key))
    for source, skip in zip(("fc7", "pool4"), self.skips):
      x = endpoints[f"upscore_{source}"] = _upsample(getattr(self, f"upscore_{source}"), x, 2)
      finer = endpoints[skip] * AT_ONCE[skip] if self.at_once else endpoints[skip]
      if self.fuse == "score":
        finer = endpoints[f"score_{skip}"] = getattr(self, f"score_{skip}")(finer)
      if caffe:
        finer = _crop(finer, CAFFE_CROPS[skip], x.shape[1:3])
      else:
        x = _crop(x, 1, finer.shape[1:3])
      x = endpoints[f"fuse_{skip}"] = x + finer
    x = endpoints["upscore"] = _upsample(self.upscore, x, self.score_stride)
    return _crop(x, CAFFE_LAST_CROP[self.score_stride] if caffe else self.score_stride // 2, size)


def _upsample(layer: layers.ConvTranspose | None, x: jax.Array, stride: int) -> jax.Array:
  return resize.upsample_bilinear(x, stride) if layer is None else layer(x)


def _crop(x: jax.Array, offset: int, size: tuple[int, int]) -> jax.Array:
  return x[:, offset : offset + size[0], offset : offset + size[1]]
