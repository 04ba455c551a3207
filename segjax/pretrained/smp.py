"""segmentation-models-pytorch: DeepLabV3Plus on ResNet, MobileNetV2 and timm's aligned Xception ("tu-")."""

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
    (r"segmentation_head\.0", "logits"),
  )
  return state_dict.convert(arrays, modules, "segmentation-models-pytorch's DeepLabV3Plus")
