"""Networks of PyTorch libraries, as options of ours: what each differs in from the paper's authors' code."""

from flax import nnx

from segjax import models
from segjax.models.classifier import Classifier

# Where the libraries agree; PyTorch's momentum of 0.1 is our 0.9.
TORCH = dict(bn_momentum=0.9)
MOBILENET = dict(normalization="imagenet", low_level="layer_4", mobilenet_epsilon=1e-5)

VAINF = TORCH | dict(separable=False, dropout=0.1)  # With separable=True: its --separable_conv.
VAINF_DETAILS = dict(
  align_corners=False, separable_norm=False, pooling_first=False, decoder_convs=1, low_level_first=True
)

SMP = TORCH | dict(atrous_rates=(12, 24, 36), dropout=0.5)
SMP_DETAILS = dict(separable_norm=False, pooling_first=False, aspp_conv=True, decoder_convs=1, dilate_first=True)
# Details separable_aspp=False: its decoder_aspp_separable=False. timm dilates its own way, and taps behind a ReLU.
SMP_XCEPTION = SMP_DETAILS | dict(dilate_first=False)

TORCHVISION_V3 = TORCH | dict(
  output_stride=8, separable=False, decoder=False, dropout=0.5, auxiliary=True,
  details=dict(align_corners=False, pooling_first=False, aspp_conv=True),
)  # fmt: skip
TORCHVISION_FCN = TORCH | dict(output_stride=8, auxiliary=True, align_corners=False)

# Scheme and network: constructor, its options.
PEERS = {
  "vainf/deeplabv3plus_resnet50": (models.DeepLabV3Plus, VAINF | dict(backbone="resnet_50", details=VAINF_DETAILS)),
  "vainf/deeplabv3plus_resnet101": (models.DeepLabV3Plus, VAINF | dict(backbone="resnet_101", details=VAINF_DETAILS)),
  "vainf/deeplabv3plus_mobilenet": (
    models.DeepLabV3Plus,
    VAINF | dict(backbone="mobilenet_v2", details=VAINF_DETAILS | MOBILENET | dict(mobilenet_padding="early")),
  ),
  "smp/deeplabv3plus_resnet50": (models.DeepLabV3Plus, SMP | dict(backbone="resnet_50", details=SMP_DETAILS)),
  "smp/deeplabv3plus_resnet101": (models.DeepLabV3Plus, SMP | dict(backbone="resnet_101", details=SMP_DETAILS)),
  "smp/deeplabv3plus_mobilenet_v2": (
    models.DeepLabV3Plus,
    SMP
    | dict(
      backbone="mobilenet_v2",
      details=SMP_DETAILS | MOBILENET | dict(mobilenet_padding="fixed", mobilenet_last_conv=True),
    ),
  ),
  **{
    f"smp/deeplabv3plus_tu-xception{depth}": (
      models.DeepLabV3Plus,
      SMP
      | dict(
        backbone=f"xception_{depth}", details=SMP_XCEPTION | dict(low_level=f"entry_block{block}/unit1/sep2/relu")
      ),
    )
    for depth, block in ((41, 2), (65, 2), (71, 3))
  },
  "torchvision/deeplabv3_resnet50": (models.DeepLabV3Plus, TORCHVISION_V3 | dict(backbone="resnet_50")),
  "torchvision/deeplabv3_resnet101": (models.DeepLabV3Plus, TORCHVISION_V3 | dict(backbone="resnet_101")),
  "torchvision/fcn_resnet50": (models.DilatedFCN, TORCHVISION_FCN | dict(backbone="resnet_50")),
  "torchvision/fcn_resnet101": (models.DilatedFCN, TORCHVISION_FCN | dict(backbone="resnet_101")),
  "torchvision/resnet50": (Classifier, TORCH | dict(backbone="resnet_50")),
  "torchvision/resnet101": (Classifier, TORCH | dict(backbone="resnet_101")),
  "torchvision/vgg16": (Classifier, dict(backbone="vgg_16")),
  "timm/xception41": (Classifier, TORCH | dict(backbone="xception_41")),
  "timm/xception65": (Classifier, TORCH | dict(backbone="xception_65")),
  "timm/xception71": (Classifier, TORCH | dict(backbone="xception_71")),
}


def build(name: str, *, num_classes: int, rngs: nnx.Rngs, **overrides) -> nnx.Module:
  """Our network with a peer's options, for `assign` with the scheme that the name begins with.

  Call under `jax.jit` or `nnx.eval_shape`, as eager initialisation takes seconds.

  Args:
    name: a key of `PEERS`.
    num_classes: channels of the logits; ImageNet classifiers have 1000.
    overrides: of the peer's options (`output_stride`, `atrous_rates`, `dtype`, ...); of `details`, those that are named.

  Raises:
    ValueError: an unknown name (lists the known ones) or an option out of range.
  """
  if name not in PEERS:
    raise ValueError(f"No network is called {name!r}: choose one of {', '.join(PEERS)}.")
  constructor, options = PEERS[name]
  if "details" in options:
    overrides["details"] = options["details"] | dict(overrides.get("details", ()))
  return constructor(num_classes=num_classes, rngs=rngs, **(options | overrides))
