"""The backbones by name, and what images they want."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import details, layers, mobilenet_v2, resnet, xception

NAMES = ("xception_41", "xception_65", "xception_71", "resnet_50", "resnet_101", "mobilenet_v2")

OFFICIAL = details.Details()

# The raw pixel that becomes 0, by normalisation.
MEANS = {"symmetric": (127.5, 127.5, 127.5), "imagenet": layers.IMAGENET_MEAN}


def build(name: str, *, output_stride: int, bn_momentum: float, frozen_bn: bool, dtype, rngs: nnx.Rngs,
          multi_grid: Sequence[int] = (1, 1, 1), detail: details.Details = OFFICIAL) -> nnx.Module:  # fmt: skip
  """A backbone: `backbone(image, train, endpoints)` -> [B, h, w, backbone.features].

  `low_level` names the end point of stride 4 that a decoder takes, `low_level_features` its channels.

  Raises:
    ValueError: an option out of range, with the values that are in it.
  """
  if name not in NAMES:
    raise ValueError(f"model.backbone = {name!r}: choose one of {', '.join(NAMES)}.")
  if output_stride not in (8, 16, 32):
    raise ValueError(f"model.output_stride = {output_stride!r}: choose 8, 16 or 32.")
  if len(multi_grid) != 3 or not all(isinstance(factor, int) and factor >= 1 for factor in multi_grid):
    raise ValueError(f"model.multi_grid = {tuple(multi_grid)!r}: give three whole numbers from 1, one per convolution.")
  if name == "mobilenet_v2" and tuple(multi_grid) != (1, 1, 1):
    raise ValueError(f"model.multi_grid = {tuple(multi_grid)!r}: mobilenet_v2 has none, leave it at (1, 1, 1).")
  if not 0 <= bn_momentum < 1:
    raise ValueError(f"model.bn_momentum = {bn_momentum} must lie in [0, 1).")
  common = dict(
    output_stride=output_stride, dilate_first=detail.dilate_first, bn_momentum=bn_momentum, frozen_bn=frozen_bn,
    dtype=dtype, rngs=rngs,
  )  # fmt: skip
  family, _, depth = name.partition("_")
  if family == "mobilenet":
    backbone = mobilenet_v2.MobileNetV2(
      padding=detail.mobilenet_padding, epsilon=detail.mobilenet_epsilon, last_conv=detail.mobilenet_last_conv,
      **common,
    )  # fmt: skip
  else:
    constructor = resnet.ResNet if family == "resnet" else xception.Xception
    backbone = constructor(int(depth), multi_grid=multi_grid, **common)
  choices = backbone.low_levels
  backbone.low_level = next(iter(choices)) if detail.low_level == "auto" else detail.low_level
  if backbone.low_level not in choices:
    raise ValueError(f"model.details.low_level = {detail.low_level!r}: choose auto, {', '.join(choices)}.")
  backbone.low_level_features = choices[backbone.low_level]
  return backbone


def check_auxiliary(auxiliary: bool, name: str) -> None:
  """Raises ValueError where an auxiliary head is asked for and the backbone has no place for one."""
  if auxiliary and not name.startswith("resnet"):
    raise ValueError(f"model.auxiliary = {auxiliary}: only a ResNet has one, {name} has not.")


def normalization(name: str) -> str:
  """ "symmetric" or "imagenet": what a backbone was first trained on."""
  return "imagenet" if name.startswith(("resnet", "vgg")) else "symmetric"


def normalize(image: jax.Array, kind: str) -> jax.Array:
  """Raw RGB in [0, 255], [B, H, W, 3] -> float32: "symmetric" in [-1, 1], "imagenet" of unit variance over ImageNet."""
  image = jnp.asarray(image).astype(jnp.float32)
  if kind == "imagenet":
    return layers.standardize(image, layers.IMAGENET_MEAN, layers.IMAGENET_STD)
  return jnp.float32(2 / 255) * image - 1
