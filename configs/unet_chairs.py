"""U-Net on few images: 97 photographs of chairs, 77 for training and 20 held out.

python -m segjax.main --config=configs/unet_chairs.py --config.data.dir=CHAIRS --workdir=runs/unet_chairs

Data:     CHAIRS/images/NAME.jpg and CHAIRS/masks/NAME.png of two colours, 000000 for background and FFFFFF for chairs;
          others: --config.data.colors=BACKGROUND,CHAIR. Exactly 20 images are held out, the same ones each time
          (--config.data.split_seed=1 for others). Furniture of your own fits as well, in any number and size.
Size:     crops of 256x256 from images at 0.4 to 1 of their size; evaluation of whole images at 0.5. Made for images of
          about 512 pixels: for larger ones, lower augment.scale and eval.scales alike.
Hardware: one GPU of 8 GB, or patience. Hours: not measured.
Score:    none published that we know. Ours: not run on the images; a test trains on generated ones of this layout. The
          20 images move a score by several per cent: compare over --config.data.folds=5 --config.data.fold=0 to 4,
          with --config.data.holdout=0.1, the default, for the 20.
"""

from segjax.config import default_config
from segjax.input_pipeline.sources import datasets


def get_config():
  config = default_config(model="unet", data="folder")
  config.data.update(datasets.CHAIRS)
  config.data.holdout = 20
  config.num_steps = 3000  # About 300 epochs: few images, much augmentation.
  config.batch_size = 8
  config.crop_size = (256, 256)
  config.eval_every = 100
  config.checkpoint_every = 100
  config.head = "sigmoid"
  config.model.width = 32
  config.model.dropout = 0.5  # The U-Net's paper, section 3.1.
  config.augment.scale = (0.4, 1.0)
  config.augment.outside = "mirror"
  config.augment.rotation = 15.0
  config.augment.hsv = (0.05, 0.2, 0.2)
  config.loss.terms = ("bce", "dice")
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 1e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 1e-2
  config.policy.metric = "foreground_iou"
  config.eval.scales = (0.5,)
  return config
