"""What a config must satisfy beyond its types: choices, ranges and combinations, each with its remedy."""

import math
from collections.abc import Iterator

from ml_collections import config_dict

from segjax.config import ConfigError, default_config, fields

CHOICES = {
  "dtype": ("float32", "bfloat16", "float64"),
  "kernels": ("auto", "plain"),
  "data.loader": ("tf_data", "grain"),
  "data.format": ("tree", "tfds"),  # Of the sources that have it, and so below.
  "data.labels": {"cityscapes": ("gtFine", "gtCoarse"), "kitti_road": ("road", "lane")},
  "head": ("softmax", "sigmoid"),
  "augment.outside": ("void", "mirror"),
  "eval.outside": ("void", "mirror"),
  "optimizer.name": ("sgd", "adamw"),
  "optimizer.schedule": ("poly", "cosine", "step", "constant"),
  "optimizer.warmup": ("linear", "constant"),
  "eval.checkpoint": ("best", "last"),
}

Rules = Iterator[tuple[bool, str, str]]  # Whether it holds, the field, and the remedy where it does not.


def validate(config: config_dict.ConfigDict) -> None:
  """Checks what types cannot express.

  Raises:
    ConfigError: all problems at once, each naming its field, its value and the remedy; first those of types.
  """
  leaves = fields(config)
  problems = _wrong_types(config)
  if not problems:
    problems = [f"config.{field} = {leaves[field]!r}: {remedy}" for ok, field, remedy in _rules(config) if not ok]
  if problems:
    raise ConfigError("The config cannot run:\n  " + "\n  ".join(problems))


def _rules(config) -> Rules:
  yield from _choices(config)
  yield from _run(config)
  yield from _data(config.data)
  yield from _augmentation(config.augment)
  yield from _loss(config)
  yield from _optimizer(config)
  yield from _policy(config.policy)
  yield from _evaluation(config.eval)


def _choices(config) -> Rules:
  leaves = fields(config)
  for field, choices in CHOICES.items():
    if field in leaves:
      choices = choices[config.data.name] if isinstance(choices, dict) else choices
      yield leaves[field] in choices, field, f"choose one of {', '.join(choices)}."


def _is_size(size: tuple, least: int) -> bool:
  return len(size) == 2 and all(isinstance(n, int) and n >= least for n in size)


def _run(config) -> Rules:
  for field in ("num_steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
                "accumulate_steps"):  # fmt: skip
    yield config[field] >= 1, field, "must be at least 1."
  yield 0 <= config.seed < 2**31, "seed", "must lie in [0, 2^31)."
  yield config.mesh.space >= 1, "mesh.space", "must be at least 1."
  yield config.mesh.data >= 1 or config.mesh.data == -1, "mesh.data", "must be at least 1, or -1 for all devices."
  yield _is_size(config.crop_size, 1), "crop_size", "must be (H, W) in pixels."
  steps = config.profile_steps
  traced = len(steps) == 2 and (steps == (0, 0) or 1 <= steps[0] <= steps[1])
  yield traced, "profile_steps", "must be (first, last), from 1 on, or (0, 0) for none."


def _data(data) -> Rules:
  named = data.name == "synthetic" or bool(data.dir)
  yield named, "data.dir", "name the data set's root folder, e.g. --config.data.dir=/data/camvid."
  yield _is_size(data.canvas_size, 0), "data.canvas_size", "must be (H, W) in pixels."
  if data.name == "synthetic":
    yield _is_size(data.image_size, 1), "data.image_size", "must be (H, W) in pixels."
  yield data.max_bad_examples >= 0, "data.max_bad_examples", "must be 0 (stop at the first) or more."
  yield data.workers >= 0, "data.workers", "must be 0 (one per core) or more."
  if "holdout" in data:
    holdout = data.holdout
    share_or_number = 0 < holdout < 1 or (holdout >= 1 and holdout == int(holdout))
    yield share_or_number, "data.holdout", "must lie between 0 and 1 (a share), or be a whole number of images."
    yield data.folds == 0 or data.folds >= 2, "data.folds", "must be 0 (none) or at least 2."
    yield 0 <= data.fold < max(data.folds, 1), "data.fold", "must lie in [0, data.folds)."
    yield data.split_seed >= 0, "data.split_seed", "must be 0 or more."
  if data.name == "folder":
    yield data.border_sigma > 0, "data.border_sigma", "must be above 0 pixels."


def _augmentation(augment) -> Rules:
  scale = augment.scale
  yield len(scale) == 2 and 0 < scale[0] <= scale[-1], "augment.scale", "must be (smallest, largest), above 0."
  yield augment.scale_step >= 0, "augment.scale_step", "must be 0 (continuous) or more."
  for field in ("brightness", "contrast", "saturation"):
    yield 0 <= augment[field] <= 1, f"augment.{field}", "must lie in [0, 1]."
  yield 0 <= augment.hue <= 0.5, "augment.hue", "must lie in [0, 0.5], a share of the colour circle."
  hsv = augment.hsv
  yield len(hsv) == 3 and all(0 <= s <= 1 for s in hsv), "augment.hsv", "needs three numbers in [0, 1]."
  for field, limit in (("rotation", 180), ("shear", 80), ("shift", 1), ("zoom", 0.9)):
    yield 0 <= augment[field] <= limit, f"augment.{field}", f"must lie in [0, {limit}]."
  yield augment.elastic >= 0, "augment.elastic", "must be 0 (off) or more pixels."


def _loss(config) -> Rules:
  loss = config.loss
  terms = {str(term).partition(":")[0] for term in loss.terms}
  yield loss.focal_gamma >= 0, "loss.focal_gamma", "must be 0 (cross-entropy) or more."
  yield loss.border_weight >= 0, "loss.border_weight", "must be 0 (off) or more."
  yield (
    not loss.border_weight or (config.data.name == "folder" and bool(config.data.instances)),
    "loss.border_weight",
    "wants to know where instances touch: set data.instances of the folder source to their masks, or to"
    ' "components"; or 0.',
  )
  yield (
    not loss.border_weight or bool(terms & {"cross_entropy", "bce"}),
    "loss.border_weight",
    "weighs the pixels of cross_entropy and bce: name one of them in loss.terms, or set it to 0.",
  )
  yield 0 < loss.hard_fraction <= 1, "loss.hard_fraction", "must lie in (0, 1]; 1 takes all pixels."
  yield (
    loss.hard_fraction == 1 or "cross_entropy" in terms,
    "loss.hard_fraction",
    "picks pixels of cross_entropy: name it in loss.terms, or set this to 1.",
  )
  yield loss.hard_fraction_steps >= 0, "loss.hard_fraction_steps", "must be 0 (at once) or more."
  weights = loss.class_weights
  named = len(weights) == 1 and weights[0] in ("median_frequency", "inverse_log")
  numbers = all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in weights)
  remedy = 'give one number >= 0 per class, ("median_frequency",), ("inverse_log",), or ().'
  yield named or numbers, "loss.class_weights", remedy
  yield loss.auxiliary_weight >= 0, "loss.auxiliary_weight", "must be 0 or more."


def _optimizer(config) -> Rules:
  optimizer = config.optimizer
  yield optimizer.base_lr > 0, "optimizer.base_lr", "must be above 0."
  yield 0 <= optimizer.end_lr <= optimizer.base_lr, "optimizer.end_lr", "must lie in [0, base_lr]."
  yield optimizer.poly_power > 0, "optimizer.poly_power", "must be above 0."
  warmed_up = 0 <= optimizer.warmup_steps < max(config.num_steps, 1)
  yield warmed_up, "optimizer.warmup_steps", "must be below num_steps."
  yield 0 <= optimizer.warmup_lr <= optimizer.base_lr, "optimizer.warmup_lr", "must lie in [0, base_lr]."
  yield optimizer.decay_every >= 1, "optimizer.decay_every", "must be at least 1."
  yield 0 < optimizer.decay_factor <= 1, "optimizer.decay_factor", "must lie in (0, 1]."
  for field in ("head_multiplier", "bias_multiplier"):
    yield optimizer[field] > 0, f"optimizer.{field}", "must be above 0; 1 changes nothing."
  for field in ("momentum", "ema_decay"):
    yield 0 <= optimizer[field] < 1, f"optimizer.{field}", "must lie in [0, 1)."
  yield not optimizer.nesterov or optimizer.name == "sgd", "optimizer.nesterov", "is an option of sgd only."
  for field in ("weight_decay", "clip_norm"):
    yield optimizer[field] >= 0, f"optimizer.{field}", "must be 0 (off) or more."


def _policy(policy) -> Rules:
  yield policy.min_gain > 0, "policy.min_gain", "must be above 0."
  yield 0 < policy.plateau_factor <= 1, "policy.plateau_factor", "must lie in (0, 1]; 1 is off."
  yield policy.plateau_patience >= 1, "policy.plateau_patience", "must be at least 1 evaluation."
  yield policy.early_stop >= 0, "policy.early_stop", "must be 0 (never) or more evaluations."


def _evaluation(evaluation) -> Rules:
  yield evaluation.batch_size >= 1, "eval.batch_size", "must be at least 1."
  scales, window, stride = evaluation.scales, evaluation.window, evaluation.window_stride
  yield len(scales) > 0 and all(s > 0 for s in scales), "eval.scales", "needs numbers above 0."
  yield _is_size(window, 0), "eval.window", "must be (H, W) in pixels."
  yield all(window) or not any(window), "eval.window", "must be (0, 0), or both above 0."
  yield _is_size(stride, 0), "eval.window_stride", "must be (H, W) in pixels."
  yield (
    all((0 < step <= side) if side else step == 0 for step, side in zip(stride, window)),
    "eval.window_stride",
    "must lie between 1 and eval.window, e.g. two thirds of it; (0, 0) without windows.",
  )
  yield 0 < evaluation.threshold < 1, "eval.threshold", "must lie between 0 and 1."
  yield evaluation.num_overlays >= 0, "eval.num_overlays", "must be 0 or more."


def _wrong_types(config: config_dict.ConfigDict) -> list[str]:
  """What ml_collections lets pass: None anywhere, and anything inside a tuple."""

  def kind(value) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names[type(value)] if type(value) in names else "something else"

  problems, defaults = [], fields(default_config(config.model.name, config.data.name))
  for name, value in fields(config).items():
    default = defaults[name]
    if not isinstance(default, tuple):
      wanted, found = {kind(default)}, {kind(value)}
    elif isinstance(value, tuple):
      numbers = default and all(kind(item) == "a number" for item in default)
      wanted, found = {"a number"} if numbers else {"a number", "text"}, {kind(item) for item in value}
    else:
      wanted, found = {"a tuple"}, {kind(value)}
    if not found <= wanted:
      problems.append(f"config.{name} = {value!r}: must hold {' or '.join(sorted(wanted))}.")
  return problems
