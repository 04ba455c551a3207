"""U-Net for salt in seismic images: TGS Salt Identification Challenge, 101x101 in a frame of 128x128.

python -m segjax.main --config=configs/unet_salt.py --config.data.dir=SALT/train --workdir=runs/unet_salt

Data:      SALT/train/images/ID.png and SALT/train/masks/ID.png as unzipped: 4000 images of 101x101, a fifth held out.
           Masks have 16 bits (65535: salt), or 8 (255); 39 % are empty, which is right. depths.csv is not read.
Frame:     101 is no multiple of the network's stride 16: images stand in 128x128, mirrored at their lower and right
           borders, in training and evaluation alike. Scores are of the 101x101 pixels.
Recipe:    the 14th place's (Argus team, github.com/lRomul/argus-tgs-salt, "Argus") optimiser, policy and Lovasz hinge; no
           ImageNet weights, no mosaics. Cross-entropy beside the hinge is ours: from scratch, it begins sooner.
Hardware:  one GPU of 8 GB. Hours: not measured.
Published: the competition's measure is another one (mean over images of precision over IoU thresholds, an empty mask
           counting as 1 if predicted empty); no citable foreground IoU. Ours: a sixtieth of this length, on half of the
           images and at half the width, in benchmarks/results.md. Neighbouring tiles of one survey fall on both sides of the split.
"""

from segjax.config import default_config
from segjax.input_pipeline.sources import datasets


def get_config():
  config = default_config(model="unet", data="folder")
  config.data.update(datasets.SALT)
  config.data.folds = 5
  config.data.canvas_size = (128, 128)
  config.eval.outside = "mirror"
  config.num_steps = 30_000  # 300 epochs of 3200 images.
  config.batch_size = 32
  config.crop_size = (128, 128)
  config.eval_every = 100  # An epoch.
  config.checkpoint_every = 100
  config.log_every = 50
  config.head = "sigmoid"
  config.model.width = 32
  config.augment.scale = (1.0, 1.2)  # Up to 121 pixels, so each crop holds the whole image.
  config.augment.outside = "mirror"
  config.augment.brightness = 0.1  # Argus varies both; by how much is ours.
  config.augment.contrast = 0.1
  config.loss.terms = ("bce", "lovasz")
  config.optimizer.base_lr = 0.01  # Argus: SGD, momentum 0.9, weight decay 1e-4.
  config.optimizer.schedule = "constant"
  config.policy.metric = "foreground_iou"
  config.policy.plateau_factor = 0.64  # Argus, this and the two below.
  config.policy.plateau_patience = 30
  config.policy.early_stop = 100
  return config
