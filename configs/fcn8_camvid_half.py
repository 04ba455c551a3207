"""FCN-8s on CamVid at half resolution, for two CPU cores; otherwise as unet_camvid_half.py.

python -m segjax.main --config=configs/fcn8_camvid_half.py --config.data.dir=CAMVID --workdir=runs/fcn8_camvid_half

From scratch, and narrower than VGG-16; scored like the U-Net. Each step takes twice the U-Net's time.
"""

from segjax.config import default_config

from . import unet_camvid_half


def get_config():
  config = unet_camvid_half.recipe(default_config(model="fcn", data="folder"))
  config.num_steps = 2000
  config.eval_every = 1000
  config.model.width = 32  # A quarter of VGG-16's multiply-adds.
  config.optimizer.base_lr = 3e-4  # No batch norm: at 2e-3 nothing is learned.
  config.optimizer.clip_norm = 1.0
  return config
