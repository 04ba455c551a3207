"""Every option of segjax, once: name, type, default, unit and reason.

A config file starts from `default_config(model=..., data=...)` and sets what differs. The result is locked and
typed, so a misspelt field or a wrong type stops in the file as on the command line. `model` and `data` choose which
`config.model.*` and `config.data.*` fields exist: they are exactly the constructor arguments of that model and
that data source, so an option that nothing reads cannot be set; one that other values keep from acting must stay at its
default. Ranges and combinations: config_rules.py.
"""

import copy
import difflib
import json
import os
import pathlib
from collections.abc import Collection

from ml_collections import config_dict

from segjax.files import atomic

IGNORE_LABEL = 255  # Void, everywhere inside segjax: no loss, no gradient, no score.
CONFIG_FILE = "config.json"  # In the workdir.

# Constructor arguments by model; the reasons and units stand in the constructors.
MODELS = {
  "unet": dict(
    width=64, depth=4, up="transposed", dropout=0.0, padding="same", batch_norm=True, bn_momentum=0.9,
  ),
  "deeplab_v3plus": dict(
    backbone="xception_65", output_stride=16, atrous_rates=("auto",), separable=True, image_pooling=True, decoder=True,
    multi_grid=(1, 1, 1), dropout=0.1, bn_momentum=0.9997, frozen_bn=False, auxiliary=False,
    details=dict(
      align_corners=True, separable_norm=True, separable_aspp=True, pooling_first=True, aspp_conv=False,
      decoder_convs=2, low_level_first=False, low_level="auto", dilate_first=False, normalization="auto",
      mobilenet_padding="same", mobilenet_epsilon=1e-3, mobilenet_last_conv=False,
    ),
  ),
  "dilated_fcn": dict(
    backbone="resnet_50", output_stride=8, dropout=0.1, bn_momentum=0.9, frozen_bn=False, auxiliary=False,
    align_corners=True,
  ),
  "fcn": dict(
    stride=8, width=64, fuse="score", upsampling="learned", at_once=False, geometry="same", normalization="imagenet",
    dropout=0.5,
  ),
}  # fmt: skip

# Constructor arguments by data source, beside `dir` and `split`.
SOURCES = {
  "synthetic": dict(
    num_train=512,  # Examples in the split `train`.
    num_val=64,  # Examples in any other split.
    image_size=(64, 64),  # (H, W), pixels.
  ),
  "folder": dict(
    images="images/{split}",  # Folder of images, under `dir`.
    masks="masks/{split}",  # Folder of masks, under `dir`; a mask has its image's name, any extension.
    mask_suffix="",  # What a mask's name has behind its image's name, e.g. "_mask".
    list="",  # List file under `dir`, e.g. "{split}.txt": a name, or "image mask" paths, per line. Empty: all.
    # Share of images held out for validation where neither folders nor lists name a split; from 1 on, their number.
    holdout=0.1,
    folds=0,  # Instead of `holdout`: so many equal parts, of which part `fold` is held out. 0: none.
    fold=0,
    split_seed=0,  # Another number holds out other images.
    # Regular expression: images in whose names it finds the same text are held out together, e.g. "^[^_]+", what is before
    # the first _. Empty: each by itself.
    group="",
    classes=(),  # Class names in the order of their ids. Empty: the lines of `dir`/classes.txt.
    # One RRGGBB per class: overlays, and the meaning of RGB and palette masks. Empty: a standard palette, and palette masks
    # are read as numbers.
    colors=(),
    void_colors=(),  # RRGGBB of RGB and palette masks that mean void.
    label_map="",  # Mask values to ids, "255:1,11:255"; 255 is void. Values not named keep their number.
    # Masks of instances (0: none), by the image's name, for loss.border_weight. "components": the connected components of
    # all classes but the first. Empty: none.
    instances="",
    border_sigma=5.0,  # Pixels; how far apart instances may be for the ground between them to weigh more.
  ),
  "voc": dict(
    format="tree",  # "tree": VOC's own folders; "tfds": TFDS's shards, under `dir`. Batches are the same, bit for bit.
  ),
  "cityscapes": dict(
    format="tree",  # "tree": Cityscapes' own folders; "tfds": TFDS's shards, under `dir`.
    labels="gtFine",  # Or "gtCoarse", which train_extra needs.
  ),
  "kitti_road": dict(
    labels="road",  # Or "lane": the lane that the car is on, which only the images um_* have.
    holdout=0.2,  # As of the folder source, from here on.
    folds=0,
    fold=0,
    split_seed=0,
  ),
  "tfds": dict(
    dataset="",  # Any TFDS data set in ArrayRecord files under `dir`: "oxford_iiit_pet", or "name/config".
    image_feature="image",
    mask_feature="segmentation_mask",
    id_feature="",  # Feature that names the examples, e.g. "file_name". Empty: they are numbered.
    classes=(),  # As of the folder source, from here on.
    colors=(),
    void_colors=(),
    label_map="",
  ),
}

# What a resumed run may change: none of these alters the updates from here on (num_steps does so through the
# schedule, and what is evaluated how often through a plateau policy, which then counts anew; both are said aloud).
HARMLESS = (
  "num_steps", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "mesh", "shard_state", "remat",
  "kernels", "profile_steps", "eval", "init",
  "data.dir", "data.eval_split", "data.loader", "data.workers", "data.cache", "data.max_bad_examples", "data.format",
  "policy.early_stop",
)  # fmt: skip

PATHS = ("data.dir", "init.path", "compilation_cache")  # Fields in which ~ is the home folder.


class ConfigError(ValueError):
  """A config, or something it names, that cannot be used. The message names every problem found and its remedy."""


def default_config(model: str = "unet", data: str = "folder") -> config_dict.ConfigDict:
  """The whole schema with its defaults, locked.

  Args:
    model: a name in `MODELS`; decides the fields of `config.model`.
    data: a name in `SOURCES`; decides the fields of `config.data`.

  Raises:
    ConfigError: an unknown name, with the list of known ones.
  """
  for field, name, known in (("model.name", model, MODELS), ("data.name", data, SOURCES)):
    if name not in known:
      raise ConfigError(f"{field}: {name!r} is none of {', '.join(known)}.")
  config = config_dict.ConfigDict()
  config.seed = 0  # Initial weights, order of examples, augmentation and dropout.
  config.num_steps = 1000  # Updates in all.
  config.batch_size = 8  # Images per update over all devices and hosts; batch norm sees all of them,
  # but for this: each update in so many parts, one after another, for batches that do not fit into memory. Without
  # batch norm (or with frozen ones) and dropout the update is that of the whole batch under cross_entropy, bce and focal;
  # batch norm sees the part, and hard_fraction, dice, jaccard and lovasz rank and compare its pixels only. Slow on CPU,
  # whose fast convolutions XLA does not use in loops.
  config.accumulate_steps = 1
  config.crop_size = (256, 256)  # (H, W) of a training crop, pixels.
  config.dtype = "float32"  # Of the computation. Parameters, statistics and loss: float32 (or float64 with float64).
  config.log_every = 20  # Steps between progress lines.
  config.eval_every = 500  # Steps between evaluations; each also saves a checkpoint. The last step always does.
  config.checkpoint_every = 500  # Steps between checkpoints.
  config.keep_checkpoints = 2  # The last so many, beside the best by policy.metric. 1: the last, to resume from.
  config.head = "softmax"  # Over all classes, or "sigmoid": one logit, for two classes, the second being foreground.
  # Devices along each axis: `data` splits the batch, `space` the image height. -1: all that remain.
  config.mesh = config_dict.ConfigDict(dict(data=-1, space=1))
  # Memory of the state per device: parameters, averages and optimiser state each on one of the devices along mesh.data,
  # gathered for each step (ZeRO, arXiv 1910.02054), instead of all on all of them.
  config.shard_state = False
  # Memory of activations: the backward pass computes those inside blocks again, a third more multiply-adds. For GPU and
  # TPU: XLA:CPU drops the barriers that put this off until it is needed, and saves nothing.
  config.remat = False
  # "auto": forms of operations that are fast on the mesh's platform (segjax/kernels); "plain": none, textbook code.
  # Results differ by rounding.
  config.kernels = "auto"

  # Steps (first, last) to trace, into WORKDIR/profile, for TensorBoard or ui.perfetto.dev; (0, 0): none. Not the first
  # one, which compiles.
  config.profile_steps = (0, 0)

  config.model = config_dict.ConfigDict(dict(name=model, **copy.deepcopy(MODELS[model])))
  config.data = config_dict.ConfigDict(
    dict(
      name=data,
      dir="",  # Root folder of the data set.
      train_split="train",
      eval_split="val",
      # "tf_data", or "grain", which never imports TensorFlow, and is taken where that is not installed. Batches are the
      # same, bit for bit.
      loader="tf_data",
      workers=0,  # Threads that read and decode, per host. 0: one per core.
      # Decoded examples are kept, so that each is decoded once: "memory", for the run; "disk", in ~/.cache/segjax/examples
      # (below $XDG_CACHE_HOME where that is set), for all runs, 4 bytes a pixel. Batches stay the same, bit for bit.
      cache="none",
      # Training examples that may turn out unreadable in mid-run; each is all void in its step, and counted. One more stops
      # the run. Evaluation always stops at the first.
      max_bad_examples=0,
      # Images that EXIF wants turned, where the mask's size does not tell whether it was drawn on the turned image, and in
      # predict, where the run's masks did not: "refuse", "apply" (turn them, as viewers do), "ignore" (pixels as stored).
      exif="refuse",
      # (H, W) that images are padded to on the host. (0, 0): the largest of the split; but where that would be mostly padding,
      # larger ones are cut, in training, to what their crops can show (input_pipeline.canvas.cut_window: the same crops are
      # as likely), and in evaluation lie whole on canvases of their own.
      canvas_size=(0, 0),
      **copy.deepcopy(SOURCES[data]),
    )
  )
  config.augment = config_dict.ConfigDict(
    dict(
      scale=(0.5, 2.0),  # Range of the random resize, relative to the stored image.
      scale_step=0.0,  # 0: continuous uniform. 0.25: one of 0.5, 0.75, ... as official DeepLab draws it.
      flip=True,  # Left-right, with probability 1/2.
      # Strengths s: a factor from [1-s, 1+s] (hue: a shift from [-s, s] of the colour circle). 0: off.
      brightness=0.0,
      contrast=0.0,
      saturation=0.0,
      hue=0.0,
      hsv=(0.0, 0.0, 0.0),  # Strengths s of what is added to hue, saturation, value, from [-s, s] of their range.
      # Affine maps about the crop's centre; uniform in [-s, s]. 0: off.
      rotation=0.0,  # Degrees.
      shear=0.0,  # Degrees.
      shift=0.0,  # Share of the crop.
      zoom=0.0,  # Height and width by a factor of [1-s, 1+s] each, beside `scale`.
      elastic=0.0,  # Pixels: deviation of the displacements of a 3x3 grid over the crop (the U-Net's paper: 10).
      outside="void",  # What crops show beyond the image: "void", or "mirror" image and label.
    )
  )
  config.loss = config_dict.ConfigDict(
    dict(
      # What is summed, with weights: ("bce", "dice:0.5"). cross_entropy (softmax head), bce (sigmoid head), dice,
      # jaccard, focal, lovasz.
      terms=("cross_entropy",),
      focal_gamma=2.0,  # How much focal neglects easy pixels (arXiv 1708.02002: 2).
      border_weight=0.0,  # w0 of the U-Net's weight map, which wants data.instances (the paper: 10). 0: off.
      # (): equal. ("median_frequency",), ("inverse_log",): from the training labels. Or one number per class. Of pixels in
      # cross_entropy, bce and focal, of classes in dice, jaccard and lovasz.
      class_weights=(),
      hard_fraction=1.0,  # Share of all pixels that counts, those of the largest loss. 1: all.
      auxiliary_weight=0.4,  # Of a model's auxiliary head (PSPNet, arXiv 1612.01105, section 5.2), where it has one.
      hard_fraction_steps=0,  # Steps over which the share falls from 1 to that. 0: at once.
    )
  )
  config.optimizer = config_dict.ConfigDict(
    dict(
      name="sgd",
      base_lr=0.01,
      schedule="poly",
      poly_power=0.9,  # DeepLab (arXiv 1606.00915, section 4.1).
      end_lr=0.0,  # What poly and cosine fall to; the least of step.
      decay_every=2000,  # Steps between the drops of the step schedule,
      decay_factor=0.1,  # and what each multiplies the rate by.
      warmup_steps=0,  # The schedule spans the steps after them.
      warmup_lr=0.0,  # Rate of the first step of a warm-up.
      warmup="linear",  # "linear" from warmup_lr to base_lr, or "constant" at warmup_lr (DeepLab's slow start).
      momentum=0.9,  # SGD momentum, or AdamW's b1.
      nesterov=False,  # SGD only.
      weight_decay=1e-4,  # On dense kernels only: no bias, no batch norm, no depthwise kernel.
      # Gradient multipliers (official DeepLab, last_layer_gradient_multiplier): of all that is not backbone, and of the
      # biases of convolutions, which official DeepLab doubles.
      head_multiplier=1.0,
      bias_multiplier=1.0,
      clip_norm=0.0,  # Largest global norm of the gradient. 0: no clipping.
      ema_decay=0.0,  # Moving average of parameters and statistics, used for evaluation. 0: none.
    )
  )
  config.policy = config_dict.ConfigDict(
    dict(
      metric="mean_iou",  # Validation score that decides which checkpoint is best, and all below; "iou/NAME" for a class.
      min_gain=1e-4,  # By which it must grow to count as better.
      plateau_factor=1.0,  # What the learning rate is multiplied by after `plateau_patience` evaluations without gain.
      plateau_patience=5,
      early_stop=0,  # Ends training after so many evaluations without gain. 0: never.
    )
  )
  config.eval = config_dict.ConfigDict(
    dict(
      batch_size=8,  # Images per evaluation step over all devices; no influence on the score.
      scales=(1.0,),  # Sizes at which the image is shown; probabilities are averaged at the label's size.
      flip=False,  # Also the mirror image, averaged.
      window=(0, 0),  # (H, W) of sliding windows at each scale, pixels. (0, 0): the whole image at once.
      window_stride=(0, 0),  # (H, W) from one window to the next; less than `window` to overlap. Not of unpadded tiles.
      threshold=0.5,  # Of the foreground's probability under the sigmoid head; each evaluation names the best one.
      outside="void",  # What the canvas shows beyond an image: "void" (the mean pixel), or "mirror".
      checkpoint="best",  # Which one --mode=eval scores: "best" by policy.metric, or "last".
      num_overlays=4,  # Pictures image | label | prediction per evaluation.
    )
  )
  config.init = config_dict.ConfigDict(
    dict(
      # Weights that a new run starts from. Empty: random. The workdir of another run; or a file: .npz, .safetensors,
      # .pth, a TensorFlow checkpoint (the name before .index) or frozen graph (.pb).
      path="",
      scheme="",  # Whose names a file's tensors have: "tf_deeplab", ... (segjax/pretrained). Empty for a workdir.
      exclude=(),  # Parameter paths or prefixes left random, e.g. ("logits",) for other classes.
    )
  )
  return config.lock()


def finalize(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Normalises what the command line gives: "a,b" in a tuple of strings becomes two items, ~ the home folder.

  Raises:
    ConfigError: the home of an unknown user.
  """
  config = config.copy_and_resolve_references()
  for name, value in fields(config).items():
    if name in PATHS and isinstance(value, str):
      _set(config, name, expand_home(value))
    elif isinstance(value, tuple) and any(isinstance(item, str) for item in value):
      _set(config, name, tuple(part.strip() for item in value for part in str(item).split(",")))
  return config


def expand_home(path: str) -> str:
  """`path` with ~ and ~user replaced.

  Raises:
    ConfigError: an unknown user.
  """
  expanded = os.path.expanduser(path)
  if expanded.startswith("~"):
    raise ConfigError(f"{path}: no such user. Write ./{path} for what is named so in this folder.")
  return expanded


def fields(config: config_dict.ConfigDict, prefix: str = "") -> dict[str, object]:
  """All leaves as {"optimizer.base_lr": 0.01, ...}."""
  leaves = {}
  for key, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      leaves |= fields(value, f"{prefix}{key}.")
    else:
      leaves[prefix + key] = value
  return leaves


def schema_problem(config) -> str:
  """Which fields are not those of the config's model and data source, or ''.

  Raises:
    ConfigError: an unknown model or data source.
  """
  try:
    have = fields(config).keys()
    want = fields(default_config(model=config.model.name, data=config.data.name)).keys()
  except (AttributeError, KeyError, TypeError):
    return "no config of segjax, which begins with segjax.config.default_config(model=..., data=...)"
  return "" if have == want else f"unknown {sorted(have - want)}, missing {sorted(want - have)}"


def suggest(name: str, names) -> str:
  """' Did you mean x?' for a misspelt field or class name, or ''. Also finds a leaf named without its section."""
  names = list(names)
  leaf = name.rpartition(".")[2]
  close = difflib.get_close_matches(name, names, 1) or [n for n in names if n.rpartition(".")[2] == leaf][:1]
  return f" Did you mean {close[0]}?" if close else ""


def to_json(config: config_dict.ConfigDict) -> str:
  """The resolved config as indented JSON."""
  return json.dumps(config.to_dict(), indent=2) + "\n"


def save(config: config_dict.ConfigDict, workdir: str | os.PathLike) -> None:
  """Writes the resolved config to `workdir`/config.json, whole or not at all."""
  atomic.write_text(pathlib.Path(workdir) / CONFIG_FILE, to_json(config))


def load(workdir: str | os.PathLike) -> config_dict.ConfigDict:
  """Reads the config a run saved; the inverse of `save`.

  Raises:
    ConfigError: no such file, or one that this version of segjax cannot read, with the fields that differ.
  """
  path = pathlib.Path(workdir) / CONFIG_FILE
  if not path.is_file():
    raise ConfigError(f"{path}: no such file, so {workdir} is not the workdir of a run. Check --workdir.")
  try:
    saved = config_dict.ConfigDict(json.loads(path.read_text()))
    config = default_config(model=saved.model.name, data=saved.data.name)
    problem = schema_problem(saved)
  except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(
      f"{path}: not a saved config ({error}). Restore the file, or start with a new --workdir."
    ) from error
  if problem:
    raise ConfigError(
      f"{path} was written by another version of segjax: {problem}. Use that version, or start with a new --workdir."
    )
  for name, value in fields(saved).items():
    try:
      _set(config, name, tuple(value) if isinstance(value, (list, tuple)) else value)
    except (TypeError, ValueError, OverflowError) as error:
      raise ConfigError(f"{path}: {name} = {value!r} is of the wrong type ({error}). Restore the file.") from error
  return config


def differences(config: config_dict.ConfigDict, saved: config_dict.ConfigDict, idle: Collection[str] = ()) -> list[str]:
  """Fields in which `config` may not continue the run of `saved`, as 'name: saved -> new' lines.

  Args:
    idle: fields that cannot act in `config`, see `config_rules.idle`; they alter nothing from here on.
  """
  new, old = fields(config), fields(saved)
  return [
    f"{name}: {old.get(name)!r} -> {new.get(name)!r}"
    for name in sorted(new.keys() | old.keys())
    if new.get(name) != old.get(name) and not any(name == h or name.startswith(h + ".") for h in (*HARMLESS, *idle))
  ]


def _set(config: config_dict.ConfigDict, name: str, value) -> None:
  section, _, leaf = name.rpartition(".")
  (config[section] if section else config)[leaf] = value
