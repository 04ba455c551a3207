"""Networks of PyTorch libraries, as options of ours: what each differs in from the paper's authors' code."""

import jax.numpy as jnp
from flax import nnx

from segjax.models.classifier import Classifier
from segjax.models.deeplab_v3plus import DeepLabV3Plus
from segjax.models.dilated_fcn import DilatedFCN
from segjax.models.unet import UNet

TORCH = dict(bn_momentum=0.9)  # Where all agree: PyTorch's momentum of 0.1.
MOBILENET = dict(normalization="imagenet", low_level="layer_4", mobilenet_epsilon=1e-5)  # Details of torchvision's.

# Its --separable_conv: override separable=True.
VAINF_DETAILS = dict(
  align_corners=False, separable_norm=False, pooling_first=False, decoder_convs=1, low_level_first=True
)
VAINF = TORCH | dict(separable=False, dropout=0.1, details=VAINF_DETAILS)

# Its decoder_atrous_rates=... and decoder_aspp_separable=False: override atrous_rates=... and
# details=dict(separable_aspp=False). Where the encoder is timm's, that one dilates, and its features are rectified.
SMP_DETAILS = dict(separable_norm=False, pooling_first=False, aspp_conv=True, decoder_convs=1)
SMP = TORCH | dict(atrous_rates=(12, 24, 36), dropout=0.5, details=SMP_DETAILS | dict(dilate_first=True))
SMP_MOBILENET = MOBILENET | dict(mobilenet_padding="fixed", mobilenet_last_conv=True)

MMSEG_DETAILS = dict(align_corners=False, head_features=512, projection_kernel=3)
MMSEG_RESNET = MMSEG_DETAILS | dict(resnet_deep_stem=True)
MMSEG = TORCH | dict(auxiliary=True, backbone="resnet_50", output_stride=8, details=MMSEG_RESNET)

TORCHVISION_DEEPLAB = TORCH | dict(
  output_stride=8,
  separable=False,
  decoder=False,
  dropout=0.5,
  auxiliary=True,
  details=dict(align_corners=False, pooling_first=False, aspp_conv=True),
)
TORCHVISION_FCN = TORCH | dict(output_stride=8, auxiliary=True, align_corners=False)
MMSEG_FCN = TORCHVISION_FCN | dict(backbone="resnet_50", deep_stem=True, concat_head=True)


def _smp_xception(depth: int, low_level: str) -> tuple:
  return DeepLabV3Plus, SMP | dict(backbone=f"xception_{depth}", details=SMP_DETAILS | dict(low_level=low_level))


# Scheme and network: the constructor and its options.
PEERS = {
  "vainf/deeplabv3plus_resnet50": (DeepLabV3Plus, VAINF | dict(backbone="resnet_50")),
  "vainf/deeplabv3plus_resnet101": (DeepLabV3Plus, VAINF | dict(backbone="resnet_101")),
  "vainf/deeplabv3plus_mobilenet": (
    DeepLabV3Plus,
    VAINF | dict(backbone="mobilenet_v2", details=VAINF_DETAILS | MOBILENET | dict(mobilenet_padding="early")),
  ),
  "smp/deeplabv3plus_resnet50": (DeepLabV3Plus, SMP | dict(backbone="resnet_50")),
  "smp/deeplabv3plus_resnet101": (DeepLabV3Plus, SMP | dict(backbone="resnet_101")),
  "smp/deeplabv3plus_mobilenet_v2": (
    DeepLabV3Plus, SMP | dict(backbone="mobilenet_v2", details=SMP["details"] | SMP_MOBILENET)
  ),
  "smp/deeplabv3plus_tu-xception41": _smp_xception(41, "entry_block2/unit1/sep2/relu"),
  "smp/deeplabv3plus_tu-xception65": _smp_xception(65, "entry_block2/unit1/sep2/relu"),
  "smp/deeplabv3plus_tu-xception71": _smp_xception(71, "entry_block3/unit1/sep2/relu"),
  "smp/unet_resnet18": (UNet, TORCH | dict(encoder="resnet_18")),
  "smp/unet_resnet34": (UNet, TORCH | dict(encoder="resnet_34")),
  "smp/unet_resnet50": (UNet, TORCH | dict(encoder="resnet_50")),
  "smp/unet_resnet101": (UNet, TORCH | dict(encoder="resnet_101")),
  "smp/unet_mobilenet_v2": (UNet, TORCH | dict(encoder="mobilenet_v2")),
  "smp/unet_vgg16_bn": (UNet, TORCH | dict(encoder="vgg16_bn")),
  "mmseg/deeplabv3plus_r50-d8": (DeepLabV3Plus, MMSEG),
  "mmseg/deeplabv3plus_r50-d8_769": (DeepLabV3Plus, MMSEG | dict(details=MMSEG_RESNET | dict(align_corners=True))),
  # Its rates of the last block are 1, 2, 4; ours double from the second unit on.
  "mmseg/deeplabv3plus_r101-d16-mg124": (
    DeepLabV3Plus, MMSEG | dict(backbone="resnet_101", output_stride=16, multi_grid=(1, 1, 2))
  ),
  "mmseg/deeplabv3plus_mobilenet-v2-d8": (
    DeepLabV3Plus,
    MMSEG
    | dict(
      backbone="mobilenet_v2",
      details=MMSEG_DETAILS | MOBILENET | dict(mobilenet_padding="fixed", dilate_first=True),
    ),
  ),
  "mmseg/fcn_r50-d8": (DilatedFCN, MMSEG_FCN),
  "mmseg/fcn_r101-d8": (DilatedFCN, MMSEG_FCN | dict(backbone="resnet_101")),
  "mmseg/unet-s5-d16_fcn": (UNet, TORCH | dict(up="bilinear_conv", head_conv=True, auxiliary=True)),
  "milesial/unet_transposed": (UNet, TORCH),
  "milesial/unet_bilinear": (UNet, TORCH | dict(up="bilinear")),
  "torchvision/deeplabv3_resnet50": (DeepLabV3Plus, TORCHVISION_DEEPLAB | dict(backbone="resnet_50")),
  "torchvision/deeplabv3_resnet101": (DeepLabV3Plus, TORCHVISION_DEEPLAB | dict(backbone="resnet_101")),
  "torchvision/fcn_resnet50": (DilatedFCN, TORCHVISION_FCN | dict(backbone="resnet_50")),
  "torchvision/fcn_resnet101": (DilatedFCN, TORCHVISION_FCN | dict(backbone="resnet_101")),
  "torchvision/resnet50": (Classifier, TORCH | dict(backbone="resnet_50")),
  "torchvision/resnet101": (Classifier, TORCH | dict(backbone="resnet_101")),
  "torchvision/vgg16": (Classifier, dict(backbone="vgg_16")),
  "timm/xception41": (Classifier, TORCH | dict(backbone="xception_41")),
  "timm/xception65": (Classifier, TORCH | dict(backbone="xception_65")),
  "timm/xception71": (Classifier, TORCH | dict(backbone="xception_71")),
}  # fmt: skip


def build(name: str, *, num_classes: int, dtype="float32", rngs: nnx.Rngs, **overrides) -> nnx.Module:
  """Our network with a peer's options, for `assign` with the scheme that the name begins with.

  Call under `jax.jit` or `nnx.eval_shape`, as eager initialisation takes seconds.

  Args:
    name: a key of `PEERS`.
    num_classes: channels of the logits; ImageNet classifiers have 1000.
    dtype: of the computation.
    overrides: of the peer's options (`output_stride`, `atrous_rates`, ...); of `details`, those that are named.

  Raises:
    ValueError: an unknown name (lists the known ones) or an option out of range.
  """
  if name not in PEERS:
    raise ValueError(f"No network is called {name!r}: choose one of {', '.join(PEERS)}.")
  constructor, options = PEERS[name]
  if "details" in options:
    overrides["details"] = options["details"] | dict(overrides.get("details", ()))
  return constructor(num_classes=num_classes, dtype=jnp.dtype(dtype), rngs=rngs, **(options | overrides))
