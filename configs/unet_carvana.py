"""U-Net that cuts out cars: the Carvana Image Masking Challenge at about 256x256, two classes.

python -m segjax.main --config=configs/unet_carvana.py --config.data.dir=CARVANA --workdir=runs/unet_carvana

Data:      CARVANA/train/CAR_01.jpg ... CAR_16.jpg and CARVANA/train_masks/CAR_01_mask.gif as unzipped: 318 cars, 5088
           images of 1280x1918. A fifth of the cars is held out, each with all of its 16 angles: a random split of images,
           as in many tutorials, shows the network every car of val, and flatters its score.
Size:      images at a fifth, 256x384, which keeps their shape; training crops are 256x256. Scores are of the masks at
           their full size.
Recipe:    github.com/petrosgk/Kaggle-Carvana-Image-Masking-Challenge ("petrosgk"), with Adam for RMSprop and shifts from
           the crop's place.
Hardware:  one GPU of 16 GB. Hours: not measured.
Published: Dice 0.992 on the public leaderboard with 256x256 squeezed from the whole image (petrosgk, README). Ours: not
           run on the images; a test trains on generated ones of this layout.
"""

from segjax.config import default_config
from segjax.input_pipeline.sources import datasets


def get_config():
  config = default_config(model="unet", data="folder")
  config.data.update(datasets.CARVANA)
  config.data.folds = 5
  config.num_steps = 12_700  # petrosgk: 50 epochs at most.
  config.batch_size = 16  # petrosgk.
  config.crop_size = (256, 256)
  config.eval_every = 254  # An epoch of 4064 images.
  config.checkpoint_every = 254
  config.head = "sigmoid"
  config.model.width = 32
  config.model.depth = 5  # 8x8 at the bottleneck, so that it sees the whole car.
  config.augment.scale = (0.18, 0.22)  # petrosgk: 10 % around the scale.
  config.augment.outside = "mirror"  # A fifth less 10 % is 230x345, which the crop exceeds.
  config.augment.hsv = (50 / 180, 5 / 255, 15 / 255)  # petrosgk, there with probability 1/2.
  config.loss.terms = ("bce", "dice")  # petrosgk.
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 1e-3
  config.optimizer.schedule = "constant"
  config.optimizer.weight_decay = 0.0  # Plain Adam.
  config.policy.metric = "foreground_dice"  # The competition's measure, there the mean over images.
  config.policy.min_gain = 1e-4  # petrosgk, this and all below.
  config.policy.plateau_factor = 0.1
  config.policy.plateau_patience = 4
  config.policy.early_stop = 8
  config.eval.scales = (0.2,)
  return config
