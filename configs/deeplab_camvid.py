"""DeepLabV3+ on Xception-65 on CamVid at full resolution, for an accelerator; otherwise as unet_camvid.py.

python -m segjax.main --config=configs/deeplab_camvid.py --config.data.dir=CAMVID --workdir=runs/deeplab_camvid

Data:      as of unet_camvid.py.
Paper:     Chen et al. 2018 (arXiv 1802.02611) for the network; it has no CamVid result.
Published: no citable score at 360x480 from scratch. Ours: not run (no accelerator at hand).
"""

from segjax.config import default_config

from . import unet_camvid


def get_config():
  config = unet_camvid.recipe(default_config(model="deeplab_v3plus", data="folder"))
  config.crop_size = (353, 481)  # A multiple of the output stride plus 1: corners stay corners at every stride.
  config.optimizer.base_lr = 1e-3
  config.model.bn_momentum = 0.99  # The paper's 0.9997 is for ten times as many steps.
  return config
