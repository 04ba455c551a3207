from segjax.config import default_config


def get_config():
  config = default_config(model="unet", data="folder")
  config.num_steps = 300
  config.batch_size = 2
  config.crop_size = (212, 212)
  config.head = "sigmoid"
  config.eval_every = 150
  config.checkpoint_every = 150
  config.log_every = 10
  config.data.images = "images"
  config.data.masks = "labels"
  config.data.folds = 4
  config.data.classes = ("membrane", "cell")
  config.data.label_map = "255:1"
  config.data.instances = "components"
  config.model.width = 16
  config.model.depth = 3
  config.model.padding = "valid"
  config.augment.scale = (1.0, 1.0)
  config.augment.rotation = 180.0
  config.augment.outside = "mirror"
  config.augment.elastic = 10.0
  config.loss.terms = ("bce",)
  config.loss.border_weight = 10.0
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 2e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 20
  config.optimizer.weight_decay = 1e-2
  config.optimizer.ema_decay = 0.98
  config.policy.metric = "foreground_iou"
  config.eval.batch_size = 1
  config.eval.window = (260, 260)
  config.eval.window_stride = (260, 260)
  return config
