"""DeepLabV3+ with MobileNetV2 on CamVid at half resolution, for two CPU cores; otherwise as unet_camvid_half.py.

python -m segjax.main --config=configs/deeplab_camvid_half.py --config.data.dir=CAMVID --workdir=runs/deeplab_camvid_half

Scored like the U-Net, against the labels at their full 360x480. From scratch; `:imagenet` begins with an ImageNet
classifier, mobilenet_v2_1.0_224_quant.tflite (tensorflow/models) in the current folder, or --config.init.path=FILE.
"""

from segjax.config import default_config

from . import unet_camvid_half


def get_config(weights="scratch"):
  if weights not in ("scratch", "imagenet"):
    raise ValueError(f"weights {weights!r}: choose scratch or imagenet")
  config = unet_camvid_half.recipe(default_config(model="deeplab_v3plus", data="folder"))
  config.crop_size = (177, 241)  # A multiple of the output stride plus 1: corners stay corners at every stride.
  config.model.backbone = "mobilenet_v2"
  config.model.atrous_rates = (3, 6, 9)  # The map is 12x16, so the paper's 12 and 18 would see padding alone.
  config.model.bn_momentum = 0.9  # The run is too short for 0.997.
  if weights == "imagenet":
    config.init.path = "mobilenet_v2_1.0_224_quant.tflite"
    config.init.scheme = "tf_deeplab"
    config.init.exclude = ("aspp", "decoder", "logits")
    config.init.unfold = True  # Its batch norm was folded into the convolutions.
    config.model.bn_momentum = 0.99
  return config
