"""In what re-implementations of DeepLabV3+ differ: the section `config.model.details`."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Details:
  """What the paper leaves open. The defaults are its authors' TensorFlow code; `pretrained.PEERS` has what others do.

  Resizing:
    align_corners: corners map to corners. Off: half-pixel centres (`models/resize.py`).
  Head:
    separable_norm: batch norm and ReLU also between the halves of a separable convolution. Off: only behind both.
    separable_aspp: off: the ASPP's branches are dense even where the option `separable` is on.
    pooling_first: the mean over all pixels comes first in the ASPP's concatenation. Off: last.
    aspp_conv: one more 3x3 convolution behind the ASPP, of the decoder's kind.
    decoder_convs: number of 3x3 convolutions behind the decoder's concatenation.
    low_level_first: the low-level features come first in that concatenation. Off: last.
    head_features: channels of ASPP and decoder.
    projection_kernel: pixels along a side of the convolution that joins the ASPP's branches, 1 or 3.
  Backbone:
    low_level: the end point of stride 4 that the decoder takes, one of the backbone's `low_levels`; "auto": the first.
    dilate_first: the layer that gives up its stride already runs at the multiplied rate. Off: only those behind it do.
    normalization: what `preprocess` does: "symmetric", to [-1, 1], or "imagenet", zero mean and unit variance over
      ImageNet. "auto": imagenet for a ResNet, else symmetric.
    resnet_deep_stem: of a ResNet: three 3x3 convolutions, to 32, 32 and 64 channels, in the place of the first 7x7 one
      (ResNet-C, arXiv 1812.01187, section 4.2).
    mobilenet_padding: of a MobileNetV2: "same" (TensorFlow's), "fixed" (PyTorch's, symmetric), or "early": no padding in
      the first layer, and each block's input is padded before its expansion, whose bias and ReLU6 the padding then sees.
    mobilenet_epsilon: of a MobileNetV2's batch norms.
    mobilenet_last_conv: whether a MobileNetV2 keeps its last convolution, to 1280 channels.
    mobilenet_divisor: a MobileNetV2's numbers of channels become multiples of it. 0: of 8 at depth multiplier 1, else of 1,
      as official DeepLab's; the ImageNet networks of slim, torchvision and others have 8.
  """

  align_corners: bool = True
  separable_norm: bool = True
  separable_aspp: bool = True
  pooling_first: bool = True
  aspp_conv: bool = False
  decoder_convs: int = 2
  low_level_first: bool = False
  head_features: int = 256
  projection_kernel: int = 1
  low_level: str = "auto"
  dilate_first: bool = False
  normalization: str = "auto"
  resnet_deep_stem: bool = False
  mobilenet_padding: str = "same"
  mobilenet_epsilon: float = 1e-3
  mobilenet_last_conv: bool = False
  mobilenet_divisor: int = 0


DETAILS = dataclasses.asdict(Details())


def resolve(details: Mapping, backbone: str) -> Details:
  """The whole of `details`, which may name only what differs from the defaults.

  Raises:
    ValueError: an unknown name, a value out of range, or a detail of a backbone that is not `backbone`.
  """
  unknown = sorted(set(details) - set(DETAILS))
  if unknown:
    raise ValueError(f"model.details has no {', '.join(unknown)}: choose from {', '.join(DETAILS)}.")
  result = Details(**details)
  for name, choices in (
    ("normalization", ("auto", "symmetric", "imagenet")),
    ("mobilenet_padding", ("same", "fixed", "early")),
  ):
    if getattr(result, name) not in choices:
      raise ValueError(f"model.details.{name} = {getattr(result, name)!r}: choose one of {', '.join(choices)}.")
  if result.head_features < 1:
    raise ValueError(f"model.details.head_features = {result.head_features} must be at least 1 channel.")
  if result.projection_kernel not in (1, 3):
    raise ValueError(f"model.details.projection_kernel = {result.projection_kernel}: choose 1 or 3.")
  if result.decoder_convs < 1:
    raise ValueError(f"model.details.decoder_convs = {result.decoder_convs} must be at least 1.")
  if not result.mobilenet_epsilon > 0:
    raise ValueError(f"model.details.mobilenet_epsilon = {result.mobilenet_epsilon} must be above 0.")
  if result.mobilenet_divisor < 0:
    raise ValueError(f"model.details.mobilenet_divisor = {result.mobilenet_divisor} must be 0 or more channels.")
  for name in (name for name in DETAILS if name.startswith(("mobilenet_", "resnet_"))):
    if not backbone.startswith(name.partition("_")[0]) and getattr(result, name) != DETAILS[name]:
      raise ValueError(
        f"model.details.{name} = {getattr(result, name)!r}: {backbone} has no such detail, leave it out."
      )
  return result
