"""VainF/DeepLabV3Plus-Pytorch: DeepLabV3+ on ResNet and MobileNetV2; names of its `model_state`."""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict, torch_parts


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`; head and decoder dense or separable."""
  modules = (
    *torch_parts.resnet(r"backbone\."),
    *torch_parts.mobilenet_v2(r"backbone\.(?:low|high)_level_features\."),
    *torch_parts.aspp(arrays, "classifier.aspp.", "body."),
    (r"classifier\.project\.0", "decoder/low_level/conv"),
    (r"classifier\.project\.1", "decoder/low_level/norm"),
    *torch_parts.conv3x3(arrays, "classifier.classifier.0", "classifier.classifier.1", "decoder/conv1", "body."),
    (r"classifier\.classifier\.3", "logits"),
  )
  return state_dict.convert(arrays, modules, "VainF/DeepLabV3Plus-Pytorch")
