"""The backbones by name, and what images they want."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import base, layers
from segjax.models.backbones.mobilenet_v2 import MobileNetV2
from segjax.models.backbones.resnet import ResNet
from segjax.models.backbones.vgg import vgg_classifier
from segjax.models.backbones.vgg_bn import VGG16BN
from segjax.models.backbones.xception import Xception
from segjax.models.deeplab_details import Details

# Constructors, of keywords alone: output_stride, multi_grid, detail, bn_momentum, frozen_bn, channels, dtype, rngs; a MobileNetV2's
# also depth_multiplier.
BACKBONES = {
  "xception_41": functools.partial(Xception, 41),
  "xception_65": functools.partial(Xception, 65),
  "xception_71": functools.partial(Xception, 71),
  "resnet_18": functools.partial(ResNet, 18),
  "resnet_34": functools.partial(ResNet, 34),
  "resnet_50": functools.partial(ResNet, 50),
  "resnet_101": functools.partial(ResNet, 101),
  "mobilenet_v2": functools.partial(MobileNetV2),
  "vgg16_bn": functools.partial(VGG16BN),
}

OFFICIAL = Details()

# The raw pixel that becomes 0, by normalisation.
MEANS = {"symmetric": (127.5, 127.5, 127.5), "imagenet": layers.IMAGENET_MEAN}


def build(
  name: str,
  *,
  output_stride: int,
  bn_momentum: float,
  frozen_bn: bool,
  dtype,
  rngs: nnx.Rngs,
  multi_grid: Sequence[int] = (1, 1, 1),
  detail: Details = OFFICIAL,
  depth_multiplier: float = 1.0,
  auxiliary: bool = False,
  channels: int = 3,
) -> base.Backbone:
  """A backbone.

  Args:
    auxiliary: whether it must have features for an auxiliary head.
    channels: of the image.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """
  if name not in BACKBONES:
    raise ValueError(f"model.backbone = {name!r}: choose one of {', '.join(BACKBONES)}.")
  if output_stride not in (8, 16, 32):
    raise ValueError(f"model.output_stride = {output_stride!r}: choose 8, 16 or 32.")
  if len(multi_grid) != 3 or not all(isinstance(factor, int) and factor >= 1 for factor in multi_grid):
    raise ValueError(f"model.multi_grid = {tuple(multi_grid)!r}: give three whole numbers from 1, one per convolution.")
  if not depth_multiplier > 0:
    raise ValueError(f"model.depth_multiplier = {depth_multiplier} must be above 0.")
  if depth_multiplier != 1 and name != "mobilenet_v2":
    raise ValueError(f"model.depth_multiplier = {depth_multiplier}: only mobilenet_v2 has one, leave it at 1.0.")
  base.check_share(bn_momentum=bn_momentum)
  backbone = BACKBONES[name](
    output_stride=output_stride,
    multi_grid=tuple(multi_grid),
    detail=detail,
    bn_momentum=bn_momentum,
    frozen_bn=frozen_bn,
    channels=channels,
    dtype=dtype,
    rngs=rngs,
    **(dict(depth_multiplier=depth_multiplier) if name == "mobilenet_v2" else {}),
  )
  if auxiliary and backbone.auxiliary is None:
    raise ValueError(f"model.auxiliary = {auxiliary}: only a ResNet and mobilenet_v2 have one, {name} has not.")
  choices = backbone.low_levels
  backbone.low_level = next(iter(choices)) if detail.low_level == "auto" else detail.low_level
  if backbone.low_level not in choices:
    raise ValueError(f"model.details.low_level = {detail.low_level!r}: choose auto, {', '.join(choices)}.")
  return backbone


# Constructors of what a `Classifier` may have below its linear layer, of keywords alone: output_stride, bn_momentum,
# frozen_bn, dtype, rngs.
CLASSIFIERS = {name: functools.partial(build, name) for name in BACKBONES} | {"vgg_16": vgg_classifier}


def normalize(image: jax.Array, kind: str) -> jax.Array:
  """Raw RGB in [0, 255], [B, H, W, 3] -> float32: "symmetric" in [-1, 1], "imagenet" of unit variance over ImageNet."""
  image = jnp.asarray(image).astype(jnp.float32)
  if kind == "imagenet":
    return layers.standardize(image, layers.IMAGENET_MEAN, layers.IMAGENET_STD)
  return jnp.float32(2 / 255) * image - 1
