"""timm: aligned Xception-41, 65 and 71, the classifiers and their `features_only` form, which has no `head.fc`; ResNet and
VGG-16 with batch norm, whose names are torchvision's but for VGG's classifier."""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict, torch_parts


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`; the classifier becomes `logits`."""
  modules = (
    *torch_parts.aligned_xception("", arrays),
    *torch_parts.resnet(""),
    *torch_parts.vgg16_bn(r"features\."),
    (r"pre_logits\.fc([12])", lambda match: f"backbone/fc{int(match[1]) + 5}"),
    (r"head\.fc|fc", "logits"),
  )
  return state_dict.convert(arrays, modules, "timm")
