"""U-Net on Cityscapes, from scratch.

python -m segjax.main --config=configs/unet_cityscapes.py --config.data.dir=CITYSCAPES --workdir=runs/unet_cityscapes

Data:      leftImg8bit/ and gtFine/ as unzipped; 2975 train, 500 val images of 1024x2048, 19 classes.
Paper:     Ronneberger et al. 2015 (arXiv 1505.04597) for the network; the recipe is mmsegmentation's
           unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024 ("mm" below), without its auxiliary head and its limit on crops
           of one class.
Hardware:  4 GPUs of 40 GB or more. Hours: not measured; 4.9 EFLOP in all (segjax.tools.flops, the backward pass as
           twice the forward), so 27 GPU hours at a sustained 50 TFLOP/s.
Published: 69.10 val mean IoU, one scale (mmsegmentation, model zoo). Ours: not run.
"""

from segjax.config import default_config


def recipe(data):
  """mmsegmentation's training of a U-Net, for any data set."""
  config = default_config(model="unet", data=data)
  config.batch_size = 16  # mm: 4 GPUs x 4, with synchronised batch norm.
  config.eval_every = 4000
  config.checkpoint_every = 2000
  config.log_every = 50
  config.model.width = 64  # The paper's.
  config.model.up = "bilinear"  # mm: InterpConv.
  config.augment.scale = (0.5, 2.0)  # mm.
  config.augment.brightness = 32 / 255  # mm: PhotoMetricDistortion, there each with probability 1/2.
  config.augment.contrast = 0.5
  config.augment.saturation = 0.5
  config.augment.hue = 0.1  # mm: 18 of OpenCV's 180 degrees.
  config.optimizer.base_lr = 0.01  # mm: SGD, momentum 0.9, poly power 0.9.
  config.optimizer.end_lr = 1e-4  # mm.
  config.optimizer.weight_decay = 5e-4  # mm, which also decays biases and batch norm.
  return config


def get_config():
  config = recipe("cityscapes")
  config.num_steps = 160_000  # mm.
  config.crop_size = (512, 1024)  # mm.
  return config
