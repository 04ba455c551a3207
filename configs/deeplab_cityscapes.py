"""DeepLabV3+ (Xception-65) on Cityscapes' fine annotations.

python -m segjax.main --config=configs/deeplab_cityscapes.py --config.data.dir=CITYSCAPES --workdir=runs/deeplab_cityscapes

Data:      leftImg8bit/ and gtFine/ as unzipped; 2975 train, 500 val images of 1024x2048, 19 classes.
Weights:   official ImageNet ones: --config.init.path=xception/model.ckpt.
Paper:     Chen et al. 2018 (arXiv 1802.02611), section 4; the rest as in deeplab_voc.py.
Hardware:  4 GPUs of 80 GB. Hours: not measured; 1.05 EFLOP in all, so 6 GPU hours at a sustained 50 TFLOP/s.
Published: val 78.79 at output stride 16 (the paper, table 7, and the official model zoo); 80.42 at 8 with
           --config.model.output_stride=8 --config.eval.scales=0.75,1.0,1.25 --config.eval.flip=True (model zoo). The
           paper's 79.14 leaves out the image-level branch: --config.model.image_pooling=False. Ours: not run.
"""

from segjax.input_pipeline.sources import datasets

from . import deeplab_voc


def get_config():
  config = deeplab_voc.recipe("cityscapes")
  config.num_steps = 90_000  # v3.
  config.crop_size = (769, 769)  # v3.
  config.data.canvas_size = datasets.CITYSCAPES_CANVAS
  config.optimizer.base_lr = 0.01  # An author, github.com/tensorflow/models/issues/3677.
  return config
