"""FCN-32s, then 16s, then 8s on Cityscapes' fine annotations.

python -m segjax.main --config=configs/fcn8_cityscapes.py --config.data.dir=CITYSCAPES --config.init.path=vgg16.pth --workdir=runs/fcn32_cityscapes
python -m segjax.main --config=configs/fcn8_cityscapes.py:16s --config.data.dir=CITYSCAPES --workdir=runs/fcn16_cityscapes
python -m segjax.main --config=configs/fcn8_cityscapes.py:8s --config.data.dir=CITYSCAPES --workdir=runs/fcn8_cityscapes

Stages:    as in fcn8_voc.py, `:at_once` too.
Data:      leftImg8bit/ and gtFine/ as unzipped; 2975 train, 500 val images of 1024x2048, 19 classes.
Weights:   torchvision's ImageNet VGG-16, vgg16-397923af.pth, as vgg16.pth above.
Paper:     Cordts et al. 2016 (arXiv 1604.01685), whose baseline is this network in these stages, on halves of images for
           want of memory; the crops of 1024x1024 here are such halves, at random places. Rates, momentum and steps are
           those of fcn8_voc.py, turned to a mean over a crop's pixels; the paper's own were not at hand.
Hardware:  one GPU of 24 GB. Hours: not measured.
Published: 8s 65.3 mean IoU on test, trained on train and val (the paper's table of baselines; the benchmark's site).
           Ours: not run.
"""

from . import fcn8_voc


def get_config(stage="32s"):
  config = fcn8_voc.recipe("cityscapes", stage, pixels=1024 * 1024)
  config.crop_size = (1024, 1024)
  config.eval.batch_size = 1  # Whole images of 1024x2048.
  return config
