"""U-Net on your own images and masks.

python -m segjax.main --config=configs/folder.py --config.data.dir=DATA --config.data.classes=ground,cell --workdir=runs/mine

Data:  DATA/images/train, DATA/masks/train, DATA/images/val, DATA/masks/val; a mask has its image's name, and holds class
       numbers from 0 on (255: void). Other layouts: data.images, data.masks, data.list; other numbers or colours:
       data.label_map, data.colors. Look first: python -m segjax.check_data with the same arguments.
Score: depends on the data; the defaults suit a few hundred images of medium size and any hardware.
"""

from segjax.config import default_config


def get_config():
  config = default_config(model="unet", data="folder")
  config.num_steps = 2000
  config.model.width = 32
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 1e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 1e-2
  return config
