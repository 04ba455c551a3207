"""DeepLabV3+ (Xception-65) on PASCAL VOC 2012, in the paper's two phases.

python -m segjax.main --config=configs/deeplab_voc.py --config.data.dir=VOCdevkit/VOC2012 --workdir=runs/deeplab_voc
python -m segjax.main --config=configs/deeplab_voc.py:trainval --config.data.dir=VOCdevkit/VOC2012 --workdir=runs/deeplab_voc_trainval

Phases:    `:trainaug` (the default) trains at output stride 16 and scores on val. `:trainval` goes on from the first one's
           workdir at output stride 8 with frozen batch norm, for the test server; val is then among its training images.
Data:      VOC2012 with trainaug: python -m segjax.prepare voc --archives=DIR. 10582 train, 1449 val images, 21 classes.
Weights:   official ImageNet ones: --config.init.path=xception/model.ckpt. From scratch, expect far less.
Paper:     Chen et al. 2018 (arXiv 1802.02611), section 4; what it leaves open as in Chen et al. 2017 (arXiv 1706.05587,
           section 4.1: "v3") and in the official code (tensorflow/models, research/deeplab).
Hardware:  batch norm needs all 16 crops: one GPU of 80 GB, or several. Hours: not measured; 0.16 EFLOP in all
           (segjax.tools.flops, the backward pass as twice the forward), so 1 GPU hour at a sustained 50 TFLOP/s; `:trainval`
           three times that.
Published: val 79.79 at output stride 16, 80.02 at 8, 81.39 at 8 with --config.eval.scales=0.5,0.75,1.0,1.25,1.5,1.75
           --config.eval.flip=True (the paper, table 5, without COCO). Ours: not run.
"""

from segjax.config import default_config
from segjax.input_pipeline.sources import datasets


def recipe(data):
  """Official DeepLab's training, for any data set."""
  config = default_config(model="deeplab_v3plus", data=data)
  config.batch_size = 16  # v3, table on batch sizes: 77.21 with 16, 75.76 with 8.
  config.eval_every = 5000
  config.checkpoint_every = 1000
  config.log_every = 50
  config.model.backbone = "xception_65"
  config.model.output_stride = 16  # v3: training at 16.
  config.augment.scale = (0.5, 2.0)  # v3.
  config.augment.scale_step = 0.25  # Official code.
  config.optimizer.schedule = "poly"  # v3: power 0.9; the momentum of 0.9 is the official code's.
  config.optimizer.weight_decay = 4e-5  # Official code, for Xception.
  config.optimizer.lr_multipliers = ("*logits/bias:2",)  # Official code: biases of logits learn twice as fast.
  config.init.scheme = "tf_deeplab"  # For the official ImageNet weights, which know nothing of the head.
  config.init.exclude = ("aspp", "decoder", "logits")
  return config


def get_config(phase="trainaug"):
  if phase not in ("trainaug", "trainval"):
    raise ValueError(f"phase {phase!r}: choose trainaug or trainval, e.g. --config=configs/deeplab_voc.py:trainval")
  config = recipe("voc")
  config.num_steps = 30_000  # v3, both phases.
  config.crop_size = (513, 513)  # v3.
  config.data.canvas_size = datasets.VOC_CANVAS
  config.data.train_split = phase
  config.optimizer.base_lr = 0.007  # v3.
  if phase == "trainval":
    config.model.output_stride = 8  # v3.
    config.model.frozen_bn = True  # v3.
    config.optimizer.base_lr = 0.001  # v3.
    config.init.path = "runs/deeplab_voc"  # The first phase, whole.
    config.init.scheme = ""
    config.init.exclude = ()
  return config
