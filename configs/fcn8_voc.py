"""FCN-32s, then 16s, then 8s on PASCAL VOC 2012, each from the one before, as the paper trains them.

python -m segjax.main --config=configs/fcn8_voc.py --config.data.dir=VOCdevkit/VOC2012 --config.init.path=vgg16.pth --workdir=runs/fcn32_voc
python -m segjax.main --config=configs/fcn8_voc.py:16s --config.data.dir=VOCdevkit/VOC2012 --workdir=runs/fcn16_voc
python -m segjax.main --config=configs/fcn8_voc.py:8s --config.data.dir=VOCdevkit/VOC2012 --workdir=runs/fcn8_voc

Stages:    `:32s` (the default) begins with ImageNet weights; `:16s` with runs/fcn32_voc, `:8s` with runs/fcn16_voc (others:
           --config.init.path). Or `:at_once`: FCN-8s from ImageNet weights directly, its skips scaled down.
Data:      VOC2012 with trainaug: python -m segjax.prepare voc --archives=DIR. 10582 train, 1449 val images, 21 classes.
           The paper trains on the 8498 images of SBD's train.
Weights:   torchvision's ImageNet VGG-16, vgg16-397923af.pth, as vgg16.pth above. From scratch, expect far less.
Paper:     Shelhamer et al. 2017 (arXiv 1605.06211); rates, momentum and stages of its "heavy learning" as in the authors'
           solver.prototxt files (github.com/shelhamer/fcn.berkeleyvision.org, "solver"): one whole image per step, no
           augmentation. There the loss is a sum over pixels, here a mean: rates are multiplied, and the weight decay
           divided, by the pixels of an image. The network is ours in one thing: no padding of 100 (--config.model.geometry=
           caffe --config.model.normalization=caffe for weights in Caffe's form).
           The earlier paper (Long et al. 2015, arXiv 1411.4038, section 4.3; about 5 points below) is, for `:32s`:
           --config.batch_size=20 --config.optimizer.base_lr=1e-4 --config.optimizer.momentum=0.9
           --config.optimizer.weight_decay=5e-4, and a hundredth of the rate for the next stage.
Hardware:  one GPU of 16 GB. Hours: not measured.
Published: 32s 63.6, 16s 65.0, 8s 65.5, at once 65.4 mean IoU on the 736 images of VOC 2011's val that are not in SBD's
           train, 8s 67.2 on VOC 2012 test (the repository's README); earlier paper 59.4, 62.4, 62.7 (its table 2).
           Ours: not run.
"""

from segjax.config import default_config

# Stride, the solver's rate (for a loss summed over pixels), the run it begins with, and the parts that are new in it.
STAGES = {
  "32s": (32, 1e-10, "", ("score_fc7", "logits")),
  "16s": (16, 1e-12, "fcn32", ("score_pool4",)),
  "8s": (8, 1e-14, "fcn16", ("score_pool3",)),
  "at_once": (8, 1e-10, "", ("score_fc7", "score_pool4", "score_pool3", "logits")),
}


def recipe(data, stage, pixels):
  """The paper's training of one stage, for any data set.

  Args:
    data: name of the source.
    stage: one of `STAGES`.
    pixels: of a training crop's label, about; turns rates for a sum over pixels into those for a mean.

  Raises:
    ValueError: another stage.
  """
  if stage not in STAGES:
    raise ValueError(f"stage {stage!r}: choose one of {', '.join(STAGES)}, e.g. --config=configs/fcn8_{data}.py:16s")
  stride, rate, before, new = STAGES[stage]
  config = default_config(model="fcn", data=data)
  config.num_steps = 100_000  # Solver, each stage.
  config.batch_size = 1  # Solver.
  config.eval_every = 4000  # Solver's snapshots.
  config.checkpoint_every = 2000
  config.log_every = 50
  config.model.stride = stride
  config.model.at_once = stage == "at_once"
  config.model.upsampling = "fixed"  # The authors' code; learning it made no difference (the repository's README).
  config.augment.scale = (1.0, 1.0)  # Long et al., section 4.3: augmentation brought nothing.
  config.augment.flip = False
  config.optimizer.base_lr = rate * pixels
  config.optimizer.schedule = "constant"  # Solver: lr_policy fixed.
  config.optimizer.momentum = 0.99  # Solver.
  config.optimizer.weight_decay = 5e-4 / pixels  # Solver: 5e-4.
  config.optimizer.lr_multipliers = ("*/bias:2",)  # Long et al., section 4.3; the authors' net.py.
  config.init.path = f"runs/{before}_{data}" if before else ""
  config.init.scheme = "" if before else "torchvision"
  config.init.exclude = new
  return config


def get_config(stage="32s"):
  config = recipe("voc", stage, pixels=500 * 375)
  config.crop_size = (500, 500)  # VOC's largest images.
  config.data.train_split = "trainaug"
  return config
