"""A small U-Net on generated shapes: nothing to download, a few minutes on two CPU cores.

python -m segjax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from segjax.config import default_config


def get_config():
  config = default_config(model="unet", data="synthetic")
  config.num_steps = 600
  config.batch_size = 8
  config.crop_size = (64, 64)
  config.log_every = 20
  config.eval_every = 300
  config.checkpoint_every = 300
  config.model.width = 16
  config.model.depth = 3
  config.augment.scale = (0.8, 1.25)
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 3e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20
  config.optimizer.weight_decay = 1e-2
  return config
