"""FCN-8s on CamVid at half resolution, for two CPU cores; otherwise as unet_camvid_half.py.

python -m segjax.main --config=configs/fcn8_camvid_half.py --config.data.dir=CAMVID --workdir=runs/fcn8_camvid_half

From scratch, and narrower than VGG-16; scored like the U-Net. Ours: val mean IoU 0.519 after 1600 steps (101 images, seed 0,
one run; U-Net 0.558, DeepLabV3+ 0.533), in 85 minutes on two cores that much else used too (1.4 s a step alone).
"""

from segjax.config import default_config

from . import unet_camvid_half


def get_config():
  config = unet_camvid_half.recipe(default_config(model="fcn", data="folder"))
  config.model.width = 32  # A quarter of VGG-16's multiply-adds.
  config.optimizer.base_lr = 3e-4  # No batch norm: at 2e-3 nothing is learned.
  config.optimizer.clip_norm = 1.0
  return config
