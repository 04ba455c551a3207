from segjax.config import default_config


def get_config():
  config = default_config(model="unet", data="folder")
  config.num_steps = 600
  config.batch_size = 8
  config.crop_size = (128, 128)
  config.head = "sigmoid"
  config.eval_every = 200
  config.checkpoint_every = 200
  config.data.images = "images"
  config.data.masks = "masks"
  config.data.list = "{split}.txt"
  config.data.classes = ("background", "nucleus")
  config.data.label_map = "255:1"
  config.data.instances = "instances"
  config.model.width = 16
  config.augment.scale = (0.7, 1.4)
  config.augment.rotation = 180.0
  config.augment.outside = "mirror"
  config.augment.hsv = (0.05, 0.1, 0.1)
  config.augment.contrast = 0.3
  config.loss.terms = ("bce", "dice")
  config.loss.border_weight = 10.0
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 2e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 1e-2
  config.optimizer.ema_decay = 0.99
  config.policy.metric = "foreground_iou"
  return config
