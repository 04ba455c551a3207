"""segmentation-models-pytorch: DeepLabV3Plus on ResNet, MobileNetV2 and timm's aligned Xception ("tu-"); Unet on the
first two and VGG-16 with batch norm."""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict, torch_parts


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`; the ASPP dense or separable."""
  modules = (
    *torch_parts.resnet(r"encoder\."),
    *torch_parts.mobilenet_v2(r"encoder\.features\."),
    *torch_parts.aligned_xception(r"encoder\.model\.", arrays),
    *torch_parts.aspp(arrays, "decoder.aspp.0."),
    *torch_parts.conv3x3(arrays, "decoder.aspp.1", "decoder.aspp.2", "aspp/conv"),
    (r"decoder\.block1\.0", "decoder/low_level/conv"),
    (r"decoder\.block1\.1", "decoder/low_level/norm"),
    *torch_parts.conv3x3(arrays, "decoder.block2.0", "decoder.block2.1", "decoder/conv1"),
    *torch_parts.vgg16_bn(r"encoder\.features\."),
    (r"decoder\.center\.([01])\.0", state_dict.counted("decoder/center/conv{}/conv")),
    (r"decoder\.center\.([01])\.1", state_dict.counted("decoder/center/conv{}/norm")),
    (r"decoder\.blocks\.(\d)\.conv([12])\.0", unet_block("conv")),
    (r"decoder\.blocks\.(\d)\.conv([12])\.1", unet_block("norm")),
    (r"segmentation_head\.0", "logits"),
  )
  return state_dict.convert(arrays, modules, "segmentation-models-pytorch")


def unet_block(part: str):
  """The path of `part` in a block of the U-Net's decoder, for `state_dict.rename`; we count blocks from 1."""
  return lambda match: f"decoder/block{int(match[1]) + 1}/conv{match[2]}/{part}"
