"""DeepLabV3+ with MobileNetV2 on a part of PASCAL VOC 2012, for two CPU cores: what weights of others are worth.

python -m segjax.main --config=configs/deeplab_voc_part.py --config.data.dir=VOC2012 --workdir=runs/voc_part

Variants:  `:imagenet` (the default) begins with an ImageNet classifier, `:frozen` trains only the head on it, `:official`
           begins with a network that DeepLab's authors trained on VOC, `:scratch` with nothing.
Data:      any VOC2012 tree with trainaug; ours has 837 images of trainaug and 129 of val, which show animals and people.
Weights:   mobilenet_v2_1.0_224_quant.tflite and deeplabv3_mnv2_dm05_pascal.tflite (tensorflow/models), in the current
           folder, or --config.init.path=FILE. Their batch norm was folded away, so `init.unfold` measures it anew.
Protocol:  images at half size, single scale, scored at their full size.
"""

from segjax.config import default_config
from segjax.input_pipeline.sources import datasets


def get_config(variant="imagenet"):
  if variant not in ("imagenet", "frozen", "official", "scratch"):
    raise ValueError(f"variant {variant!r}: choose imagenet, frozen, official or scratch")
  config = default_config(model="deeplab_v3plus", data="voc")
  config.data.canvas_size = datasets.VOC_CANVAS
  config.data.train_split = "trainaug"
  config.num_steps = 1500
  config.batch_size = 8
  config.crop_size = (257, 257)
  config.eval_every = 750
  config.checkpoint_every = 250
  config.eval.scales = (0.5,)
  config.augment.scale = (0.35, 0.8)
  config.model.backbone = "mobilenet_v2"
  config.model.atrous_rates = (3, 6, 9)  # The feature map is 17x17, so the paper's 12 and 18 would see padding alone.
  config.model.bn_momentum = 0.99  # The run is too short for 0.9997.
  config.optimizer.name = "adamw"
  config.optimizer.base_lr = 1e-3
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 50
  config.optimizer.weight_decay = 1e-2
  config.optimizer.ema_decay = 0.99
  if variant == "scratch":
    return config
  config.init.scheme = "tf_deeplab"
  config.init.unfold = True
  if variant == "official":
    config.init.path = "deeplabv3_mnv2_dm05_pascal.tflite"
    config.model.depth_multiplier = 0.5
    config.model.atrous_rates = ()
    config.model.decoder = False
    config.optimizer.base_lr = 1e-4  # It needs little more.
    return config
  config.init.path = "mobilenet_v2_1.0_224_quant.tflite"
  config.init.exclude = ("aspp", "decoder", "logits")
  if variant == "frozen":
    config.optimizer.freeze = ("backbone",)
  else:
    config.optimizer.lr_multipliers = ("backbone:0.2",)
  return config
