"""The published U-Net's training on the membranes of ISBI 2012, narrow enough for two CPU cores.

python -m segjax.main --config=configs/unet_isbi.py --config.data.dir=ISBI --workdir=runs/unet_isbi

Data:      images/N.png and labels/N.png (255 cell, 0 membrane), 512x512: the slices of the challenge's train-volume.tif
           and train-labels.tif. One of four parts is held out: 5 of our 20 images, which are neighbours of the other 15
           in one piece of tissue. The foreground of all scores are the cells.
Paper:     Ronneberger et al. 2015 (arXiv 1505.04597): unpadded convolutions and mirrored borders (section 2), the weight
           map (equation 2) of the connected components of cells, w0 10 and sigma 5, elastic deformation by a 3x3 grid of
           10 pixels (section 3.1), predictions in overlapping tiles (figure 2). Ours: 1/16 of its multiply-adds (width
           16), three poolings instead of four (44 instead of 92 pixels of border), batch norm, Adam.
Published: pixel error 0.0611, Rand error 0.0382 on the challenge's test images (table 1), whose labels are not public.
Ours:      IoU of cells 0.868, of membranes 0.648 at a threshold of 0.5; of cells 0.899 at 0.2, the best for these images;
           pixel error 0.106; seed 0, one run (benchmarks/results.md). The weight map widens the membranes:
           benchmarks/cells.md has what it and elastic deformation bring in 300 steps.
"""

from segjax.config import default_config


def get_config():
  config = default_config(model="unet", data="folder")
  config.num_steps = 1000
  config.batch_size = 2
  config.crop_size = (212, 212)  # The network sees 300x300.
  config.head = "sigmoid"
  config.eval_every = 500
  config.checkpoint_every = 250
  config.log_every = 10
  config.data.images = "images"
  config.data.masks = "labels"
  config.data.folds = 4  # Fold 0: 5 of the 20 images for validation, 15 for training.
  config.data.classes = ("membrane", "cell")
  config.data.label_map = "255:1"
  config.data.instances = "components"
  config.model.width = 16  # The paper: 64.
  config.model.depth = 3  # The paper: 4.
  config.model.padding = "valid"
  config.augment.scale = (1.0, 1.0)
  config.augment.rotation = 180.0  # Tissue has no upper side.
  config.augment.outside = "mirror"  # As its predictions see it.
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
  config.eval.window = (260, 260)  # Four tiles an image.
  return config
