"""FCN-8s on KITTI's road: two classes, as in the widespread tutorial.

python -m segjax.main --config=configs/fcn8_kitti_road.py --config.data.dir=data_road --workdir=runs/fcn8_kitti_road
"""

from segjax.config import default_config


def get_config():
  config = default_config(model="fcn", data="kitti_road")
  config.num_steps = 1160  # 40 epochs of 231 images.
  config.batch_size = 8
  config.crop_size = (160, 576)  # The tutorial's size.
  config.eval_every = 145
  config.checkpoint_every = 145
  config.model.fuse = "features"  # The tutorial's.
  config.model.dropout = 0.5  # The tutorial's keep probability.
  config.data.folds = 5
  config.augment.scale = (0.475, 0.6)  # 174 x 581 and more of the smallest images, 370x1224.
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 1e-4
  config.optimizer.schedule = "constant"
  config.optimizer.weight_decay = 0.0  # Plain Adam.
  config.policy.metric = "foreground_iou"
  config.eval.scales = (0.5,)
  config.init.scheme = "torchvision"
  config.init.exclude = ("score_fc7", "upscore_fc7", "upscore_pool4", "upscore", "logits")
  return config
