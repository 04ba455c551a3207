"""DeepLabV3+ with MobileNetV2 on CamVid at half resolution, for two CPU cores; otherwise as unet_camvid_half.py.

python -m segjax.main --config=configs/deeplab_camvid_half.py --config.data.dir=CAMVID --workdir=runs/deeplab_camvid_half

From scratch; scored like the U-Net, against the labels at their full 360x480. Ours: val mean IoU 0.533 after 1600 steps
(101 images, seed 0, one run; the U-Net of the same budget 0.558), in 39 minutes on two cores that others used too.
"""

from segjax.config import default_config

from . import unet_camvid_half


def get_config():
  config = unet_camvid_half.recipe(default_config(model="deeplab_v3plus", data="folder"))
  config.crop_size = (177, 241)  # A multiple of the output stride plus 1: corners stay corners at every stride.
  config.model.backbone = "mobilenet_v2"
  config.model.atrous_rates = (3, 6, 9)  # The map is 12x16, so the paper's 12 and 18 would see padding alone.
  config.model.bn_momentum = 0.9  # The run is too short for 0.997.
  return config
