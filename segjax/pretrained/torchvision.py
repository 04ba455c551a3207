"""torchvision: ImageNet's ResNet, VGG-16 with and without batch norm and MobileNetV2; DeepLabV3 and FCN on ResNet."""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict, torch_parts

# VGG-16 numbers convolutions, ReLUs and poolings through.
VGG_CONVS = {
  0: "1_1", 2: "1_2", 5: "2_1", 7: "2_2", 10: "3_1", 12: "3_2", 14: "3_3",
  17: "4_1", 19: "4_2", 21: "4_3", 24: "5_1", 26: "5_2", 28: "5_3",
}  # fmt: skip


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`; a classifier becomes `logits`.

  `classifier` and the numbers in it mean another thing in each of the networks, which some other name tells apart.
  """
  if any(name.startswith("features.0.0.") for name in arrays):
    modules = (*torch_parts.mobilenet_v2(r"features\."), (r"classifier\.1", "logits"))
  elif any(name.startswith("features.") for name in arrays):
    plain = ((rf"features\.{n}", f"backbone/conv{conv}") for n, conv in VGG_CONVS.items())
    modules = (
      *(torch_parts.vgg16_bn(r"features\.") if "features.1.weight" in arrays else plain),
      (r"classifier\.0", "backbone/fc6"),
      (r"classifier\.3", "backbone/fc7"),
      (r"classifier\.6", "logits"),
    )
  elif any(name.startswith("classifier.0.convs.") for name in arrays):
    modules = (
      *torch_parts.aspp(arrays, "classifier.0."),
      (r"classifier\.1", "aspp/conv/conv"),
      (r"classifier\.2", "aspp/conv/norm"),
      (r"classifier\.4", "logits"),
    )
  else:
    modules = (
      (r"fc", "logits"),
      (r"classifier\.0", "head/conv"),
      (r"classifier\.1", "head/norm"),
      (r"classifier\.4", "logits"),
    )
  modules += (
    *torch_parts.resnet(r"(?:backbone\.)?"),
    (r"aux_classifier\.0", "auxiliary/conv/conv"),
    (r"aux_classifier\.1", "auxiliary/conv/norm"),
    (r"aux_classifier\.4", "auxiliary/logits"),
  )
  return state_dict.convert(arrays, modules, "torchvision", layouts=((r"backbone/fc6", fc6_kernel),))


def fc6_kernel(weight: np.ndarray) -> np.ndarray:
  """[out, 512 * 7 * 7], the map being flattened channels first, -> [7, 7, 512, out]."""
  return state_dict.channels_last(weight.reshape(len(weight), -1, 7, 7))
