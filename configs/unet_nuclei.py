"""U-Net that finds nuclei, whose neighbours it learns to tell apart by the paper's weight map; for two CPU cores.

python -m segjax.main --config=configs/unet_nuclei.py --config.data.dir=NUCLEI --workdir=runs/unet_nuclei

Data:      the 2018 Data Science Bowl's stage1_train: python -m segjax.prepare nuclei --archives=DIR --out=NUCLEI makes
           images/, masks/ (0, 255), instances/ (16 bits, a number per nucleus), train.txt and val.txt of its folders.
Paper:     Ronneberger et al. 2015 (arXiv 1505.04597): the network, and equation 2, w0 10 and sigma 5 (section 3), from
           instances/. Where nuclei touch without ground between them, as many do, it weighs the ground around them.
           Padding, batch norm, Adam and a dice term beside the cross-entropy are ours: it is a short run.
Published: the Bowl scores instances, not pixels; no foreground IoU to cite.
Ours:      val foreground IoU 0.827 (Dice 0.906) at a threshold of 0.5, nearly the best one; 42 images of 256x256, 251 to
           train on; seed 0, one run (benchmarks/results.md).
"""

from segjax.config import default_config


def get_config():
  config = default_config(model="unet", data="folder")
  config.num_steps = 1500
  config.batch_size = 8
  config.crop_size = (128, 128)
  config.head = "sigmoid"
  config.eval_every = 500
  config.checkpoint_every = 250
  config.data.images = "images"
  config.data.masks = "masks"
  config.data.list = "{split}.txt"
  config.data.classes = ("background", "nucleus")
  config.data.label_map = "255:1"
  config.data.instances = "instances"
  config.model.width = 16  # 1/16 of the multiply-adds of the paper's 64.
  config.augment.scale = (0.7, 1.4)
  config.augment.rotation = 180.0  # Cells have no upper side.
  config.augment.outside = "mirror"
  # Factors, not shifts, as hsv has them: those would drown the nuclei of the many dark images.
  config.augment.brightness = 0.3
  config.augment.contrast = 0.3
  config.augment.saturation = 0.3
  config.augment.hue = 0.05
  config.loss.terms = ("bce", "dice")
  config.loss.border_weight = 10.0
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 2e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 1e-2
  config.optimizer.ema_decay = 0.99
  config.policy.metric = "foreground_iou"
  config.eval.batch_size = 2  # The Bowl's largest image, 1040x1388, is the canvas of all.
  return config
