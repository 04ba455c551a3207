"""U-Net on CamVid at full resolution, for an accelerator. From scratch, 367 training images, 11 classes.

python -m segjax.main --config=configs/unet_camvid.py --config.data.dir=CAMVID --workdir=runs/unet_camvid

Data:      SegNet's CamVid folders: train/, trainannot/, val/, valannot/, test/, testannot/ (360x480, void = 11).
Paper:     Ronneberger et al. 2015 (arXiv 1505.04597) for the network; it has no CamVid result.
Published: no citable U-Net score at 360x480 from scratch. Ours: not run (no accelerator at hand).
"""

from segjax.config import default_config
from segjax.input_pipeline.sources import datasets


def recipe(config):
  """Data, augmentation, loss and optimiser, the same for any model."""
  config.data.update(datasets.CAMVID)
  config.num_steps = 9000  # About 200 epochs.
  config.batch_size = 8
  config.crop_size = (352, 480)  # The largest multiple of the network's stride 16 in 360x480.
  config.eval_every = 1000
  config.checkpoint_every = 1000
  config.augment.scale = (0.7, 1.5)
  config.loss.class_weights = ("inverse_log",)  # Without weights, poles, fences and people are never predicted.
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 2e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 100
  config.optimizer.weight_decay = 1e-2
  config.optimizer.ema_decay = 0.99
  return config


def get_config():
  config = recipe(default_config(model="unet", data="folder"))
  config.model.width = 64  # The paper's.
  return config
