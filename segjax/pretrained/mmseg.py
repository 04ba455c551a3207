"""mmsegmentation: DeepLabV3+ on its ResNetV1c-50/101 and MobileNetV2, FCN on the first two, U-Net with an FCN's head."""

import itertools
from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict, torch_parts

# Units before each of MobileNetV2's stages; our layer 1 is the first convolution.
BEFORE = (0, *itertools.accumulate((1, 2, 3, 4, 3, 3)))
# Index in the stem, and our layer.
STEM = {0: "conv1_1/conv", 1: "conv1_1/norm", 3: "conv1_2/conv", 4: "conv1_2/norm", 6: "conv1/conv", 7: "conv1/norm"}


def conv_norm(name: str, path: str) -> state_dict.Modules:
  """Its ConvModule: a convolution and batch norm."""
  return ((rf"{name}\.conv", f"{path}/conv"), (rf"{name}\.bn", f"{path}/norm"))


def separable(name: str, path: str) -> state_dict.Modules:
  """Its DepthwiseSeparableConvModule."""
  halves = ("depthwise", "pointwise")
  return tuple(
    (rf"{name}\.{half}_conv\.{leaf}", f"{path}/{half}{ours}")
    for half in halves
    for leaf, ours in (("conv", ""), ("bn", "_norm"))
  )


def mobilenet_v2() -> state_dict.Modules:
  """Of MobileNetV2; the first unit has no expansion, so all inside it is numbered one lower."""

  def inside(path):
    return lambda match: f"backbone/layer_{BEFORE[int(match[1]) - 1] + int(match[2]) + 2}/{path}"

  def parts(unit, first):
    depthwise, project = rf"{unit}\.conv\.{first}", rf"{unit}\.conv\.{first + 1}"
    return (
      (rf"{depthwise}\.conv", inside("depthwise")),
      (rf"{depthwise}\.bn", inside("depthwise_norm")),
      (rf"{project}\.conv", inside("project/conv")),
      (rf"{project}\.bn", inside("project/norm")),
    )

  unit = r"backbone\.layer([2-7])\.(\d+)"
  return (
    *conv_norm(r"backbone\.conv1", "backbone/layer_1"),
    *parts(r"backbone\.layer(1)\.(0)", 0),
    (rf"{unit}\.conv\.0\.conv", inside("expand/conv")),
    (rf"{unit}\.conv\.0\.bn", inside("expand/norm")),
    *parts(unit, 1),
  )


def unet() -> state_dict.Modules:
  """Its U-Net; level 0 is the finest in both paths."""
  convs = ((r"encoder\.(\d)\.[01]", "down"), (r"decoder\.(\d)\.conv_block", "up"))
  return (
    *(
      (rf"backbone\.{path}\.convs\.{n}\.{leaf}", rf"{ours}\1/{part}{n + 1}")
      for path, ours in convs
      for n in (0, 1)
      for leaf, part in (("conv", "conv"), ("bn", "norm"))
    ),
    *conv_norm(r"backbone\.decoder\.(\d)\.upsample\.interp_upsample\.1", r"upconv\1"),
  )


MODULES = (
  *((rf"backbone\.stem\.{n}", f"backbone/{part}") for n, part in STEM.items()),
  *torch_parts.resnet(r"backbone\."),
  *mobilenet_v2(),
  *unet(),
  *conv_norm(r"decode_head\.image_pool\.1", "aspp/pooling"),
  *conv_norm(r"decode_head\.aspp_modules\.0", "aspp/branch0"),
  *(pair for n in (1, 2, 3) for pair in separable(rf"decode_head\.aspp_modules\.{n}", f"aspp/branch{n}")),
  *conv_norm(r"decode_head\.bottleneck", "aspp/projection"),
  *conv_norm(r"decode_head\.c1_bottleneck", "decoder/low_level"),
  *(pair for n in (0, 1) for pair in separable(rf"decode_head\.sep_bottleneck\.{n}", f"decoder/conv{n + 1}")),
  *conv_norm(r"decode_head\.convs\.0", "head"),
  *conv_norm(r"decode_head\.convs\.1", "head2"),
  *conv_norm(r"decode_head\.conv_cat", "head_concat"),
  (r"decode_head\.conv_seg", "logits"),
  *conv_norm(r"auxiliary_head\.convs\.0", "auxiliary/conv"),
  (r"auxiliary_head\.conv_seg", "auxiliary/logits"),
)


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`."""
  return state_dict.convert(arrays, MODULES, "mmsegmentation")
