"""U-Net on CamVid at half resolution, for two CPU cores; scored against the labels at their full 360x480.

python -m segjax.main --config=configs/unet_camvid_half.py --config.data.dir=CAMVID --workdir=runs/unet_camvid_half
"""

from segjax.config import default_config

from . import unet_camvid


def recipe(config):
  """CamVid at half resolution, the same for any model."""
  config = unet_camvid.recipe(config)
  config.num_steps = 3000
  config.batch_size = 4
  config.crop_size = (176, 240)
  config.eval_every = 1500
  config.checkpoint_every = 500
  # Weights by class as in unet_camvid.py made signs, fences and people two to three times too many. These are about the square
  # roots of ENet's (arXiv 1606.02147), so that thin and rare classes are found at all; chosen on training images that were
  # held out (benchmarks/results.md). Dice counts both errors.
  config.loss.terms = ("cross_entropy", "dice")
  config.loss.class_weights = (0.7, 0.6, 2.0, 0.6, 0.9, 0.7, 1.9, 1.6, 1.3, 2.0, 1.9)
  config.augment.scale = (0.35, 0.75)  # Half the full-resolution range.
  config.eval.scales = (0.5,)
  return config


def get_config():
  config = recipe(default_config(model="unet", data="folder"))
  config.model.width = 16  # 1/16 of the multiply-adds of the paper's 64.
  return config
