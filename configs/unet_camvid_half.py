"""U-Net on CamVid at half resolution, for two CPU cores; scored against the labels at their full 360x480.

python -m segjax.main --config=configs/unet_camvid_half.py --config.data.dir=CAMVID --workdir=runs/unet_camvid_half
"""

from segjax.config import default_config

from . import unet_camvid


def recipe(config):
  """CamVid at half resolution, the same for any model."""
  config = unet_camvid.recipe(config)
  config.num_steps = 1600
  config.batch_size = 4
  config.crop_size = (176, 240)
  config.eval_every = 800
  config.checkpoint_every = 400
  config.augment.scale = (0.35, 0.75)  # Half the full-resolution range.
  config.eval.scales = (0.5,)
  return config


def get_config():
  config = recipe(default_config(model="unet", data="folder"))
  config.model.width = 16  # 1/16 of the multiply-adds of the paper's 64.
  return config
