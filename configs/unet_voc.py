"""U-Net on PASCAL VOC 2012 (trainaug), from scratch or on an encoder with ImageNet weights.

python -m segjax.main --config=configs/unet_voc.py --config.data.dir=VOCdevkit/VOC2012 --workdir=runs/unet_voc
python -m segjax.main --config=configs/unet_voc.py:resnet34 --config.data.dir=VOCdevkit/VOC2012 --workdir=runs/unet_voc_resnet34

Variants:  `:scratch` (the default) is the paper's network. `:resnet34` has a ResNet-34 as its contracting path and
           segmentation_models_pytorch's decoder.
Data:      VOC2012 with trainaug: python -m segjax.prepare voc --archives=DIR. 10582 train, 1449 val images, 21 classes.
Weights:   of `:resnet34`: torchvision's, downloaded once (`pip install 'segjax[hub]'`, and PyTorch, which reads them); or
           --config.init.path=FILE --config.init.scheme=torchvision.
Paper:     Ronneberger et al. 2015 (arXiv 1505.04597) for the network; it has no VOC result. Recipe: unet_cityscapes.py.
Hardware:  4 GPUs of 40 GB or more. Hours: not measured; 1.2 EFLOP in all, so 7 GPU hours at a sustained 50
           TFLOP/s.
Published: no citable U-Net score on VOC val from scratch. Ours: not run. Without pretraining, expect far less than what
           networks with ImageNet weights reach (configs/deeplab_voc.py).
"""

from segjax.input_pipeline.sources import datasets

from . import unet_cityscapes


def get_config(variant="scratch"):
  if variant not in ("scratch", "resnet34"):
    raise ValueError(f"variant {variant!r}: choose scratch or resnet34")
  config = unet_cityscapes.recipe("voc")
  config.data.train_split = "trainaug"
  config.data.canvas_size = datasets.VOC_CANVAS
  config.num_steps = 80_000  # About 120 epochs; from scratch, so longer than the 30000 of a pretrained DeepLab.
  config.crop_size = (512, 512)
  if variant == "resnet34":
    config.num_steps = 30_000  # deeplab_voc.py's.
    config.model.encoder = "resnet_34"
    config.model.up = "transposed"  # The default: on an encoder it cannot act.
    config.init.path = "torchvision/resnet34"
    config.init.exclude = ("decoder", "logits")
    config.optimizer.lr_multipliers = ("backbone:0.1",)  # VainF/DeepLabV3Plus-Pytorch's, for the same start.
  return config
