"""Published weights by name: `init.path = torchvision/resnet50`. Only files whose address and checksum their publisher states.

torchvision writes the first eight digits of a file's SHA-256 into its name (torch.hub checks them), and scores and licence into
its documentation (pytorch.org/vision, "Models and pre-trained weights").
"""

from typing import NamedTuple


class Entry(NamedTuple):
  """One file.

  Attributes:
    url: its address.
    sha256: of its content, or the first digits that its publisher states.
    scheme: whose names its tensors have, see `pretrained.SCHEMES`.
    network: of ours that takes it, with what `init.exclude` has to name.
    license: of code and weights, as published.
    score: published.
  """

  url: str
  sha256: str
  scheme: str
  network: str
  license: str
  score: str


_HEAD = "init.exclude=aspp,decoder,logits"
_ENCODER = "or unet, model.encoder"


def _torchvision(file: str, network: str, score: str) -> Entry:
  url = f"https://download.pytorch.org/models/{file}.pth"
  return Entry(url, file.rpartition("-")[2], "torchvision", network, "BSD-3-Clause", score)


def _classifier(file: str, backbone: str, accuracy: float) -> Entry:
  network = f"deeplab_v3plus, model.backbone={backbone}, {_HEAD}; {_ENCODER}={backbone}, init.exclude=decoder,logits"
  return _torchvision(file, network, f"ImageNet top-1 {accuracy:.2f} %")


def _segmentation(file: str, name: str, mean_iou: float) -> Entry:
  return _torchvision(
    file, f"`pretrained.build('torchvision/{name}')`", f"COCO val, VOC's classes: mean IoU {mean_iou} %"
  )


REGISTRY = {
  "torchvision/resnet18": _classifier("resnet18-f37072fd", "resnet_18", 69.758),
  "torchvision/resnet34": _classifier("resnet34-b627a593", "resnet_34", 73.314),
  "torchvision/resnet50": _classifier("resnet50-0676ba61", "resnet_50", 76.130),
  "torchvision/resnet101": _classifier("resnet101-63fe2227", "resnet_101", 77.374),
  "torchvision/mobilenet_v2": _classifier("mobilenet_v2-b0353104", "mobilenet_v2", 71.878),
  "torchvision/vgg16_bn": _torchvision(
    "vgg16_bn-6c64b313",
    "unet, model.encoder=vgg16_bn, init.exclude=decoder,logits,backbone/fc6,backbone/fc7",
    "ImageNet top-1 73.36 %",
  ),
  "torchvision/fcn_resnet50": _segmentation("fcn_resnet50_coco-1167a1af", "fcn_resnet50", 60.5),
  "torchvision/fcn_resnet101": _segmentation("fcn_resnet101_coco-7ecb50ca", "fcn_resnet101", 63.7),
  "torchvision/deeplabv3_resnet50": _segmentation("deeplabv3_resnet50_coco-cd0a2569", "deeplabv3_resnet50", 66.4),
  "torchvision/deeplabv3_resnet101": _segmentation("deeplabv3_resnet101_coco-586e9e4e", "deeplabv3_resnet101", 67.4),
}


def table() -> str:
  """For docs/weights.md."""
  rows = [f"| `{name}` | {e.network} | {e.score} | {e.license} | {e.sha256} |" for name, e in REGISTRY.items()]
  head = "| `init.path` | network | published | licence | SHA-256 |\n|---|---|---|---|---|"
  return "\n".join([head, *rows])
