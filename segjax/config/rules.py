"""What a config must satisfy beyond its types: choices, ranges and combinations, each with its remedy."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ml_collections import config_dict

from segjax.config import ConfigError, default_config, fields, options, patterns, schema_problem, suggest

CHOICES = {
  "dtype": ("float32", "bfloat16", "float64"),
  "matmul_precision": ("default", "highest"),
  "kernels": ("auto", "plain"),
  "data.loader": ("tf_data", "grain"),
  "data.sampling": ("uniform", "class_balanced"),
  "data.exif": ("refuse", "apply", "ignore"),
  "data.depth": ("uint8", "uint16", "float32"),
  "data.cache": ("none", "memory", "disk", "device"),
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


def _terms(config) -> set[str]:
  return {str(term).partition(":")[0] for term in config.loss.terms}


def _names_term(term: str, config) -> bool:
  return term in _terms(config)


def _holds_out(config) -> bool:
  data = config.data
  return not data.list and not any("{split}" in pattern for pattern in (data.images, data.masks))


def _dense_only(model) -> bool:
  """Whether no part of a DeepLab would be separable, whatever `model.separable` says."""
  branches = model.atrous_rates and model.details.separable_aspp
  return not (branches or model.decoder or model.details.aspp_conv)


class Acts(NamedTuple):
  """When a field acts. A row counts where the config has all of its fields; a field may have several, all of which must hold.

  Attributes:
    field: where it does not act, it must be at its default.
    deciders: the fields that decide.
    when: of the config; may meet values out of range.
    remedy: how to let it act.
  """

  field: str
  deciders: tuple[str, ...]
  when: Callable[[config_dict.ConfigDict], bool]
  remedy: str


# Fields without a row always act, or are refused by the model's constructor (depth_multiplier, multi_grid, auxiliary,
# details.mobilenet_*).
# init.* has none: a config file names the scheme of weights that the command line may add. Nor have properties of a data set
# of which evaluation may show a part: a row must not depend on data.eval_split.
ACTS = (
  Acts("matmul_precision", ("dtype",), lambda c: c.dtype == "float32", "set dtype to float32"),
  Acts("shard_state", ("mesh.data",), lambda c: c.mesh.data != 1, "set mesh.data to -1 or above 1"),
  Acts("data.dir", ("data.name",), lambda c: c.data.name != "synthetic",
       "take a config of the source that reads it, e.g. configs/folder.py"),
  Acts("data.max_bad_examples", ("data.name",), lambda c: c.data.name != "synthetic",
       "take a source that reads files; generated examples are never bad"),
  Acts("data.sampling_temperature", ("data.sampling",), lambda c: c.data.sampling == "class_balanced",
       "set data.sampling to class_balanced"),
  *(Acts(f"data.{field}", ("data.images", "data.masks", "data.list"), _holds_out,
         "take {split} out of data.images and data.masks, and name no data.list, so that images are held out")
    for field in ("holdout", "folds", "split_seed", "group")),
  Acts("data.holdout", ("data.folds",), lambda c: c.data.folds == 0, "set data.folds to 0"),
  Acts("data.fold", ("data.folds",), lambda c: c.data.folds > 0, "set data.folds to the number of parts"),
  *(Acts(f"data.{field}", ("data.channels",), lambda c: c.data.channels > 0, "set data.channels")
    for field in ("depth", "mean", "std")),
  *(Acts(f"augment.{field}", ("data.channels",), lambda c: c.data.channels == 0,
         "it is defined for RGB of 8 bits: set data.channels to 0")
    for field in ("brightness", "contrast", "saturation", "hue", "hsv", "gamma", "noise")),
  Acts("data.void_colors", ("data.colors",), lambda c: bool(c.data.colors), "name the classes' colours too"),
  *(Acts(f"data.{field}", ("loss.border_weight",), lambda c: c.loss.border_weight > 0,
         "set loss.border_weight, e.g. to 10") for field in ("instances", "border_sigma")),
  Acts("model.bn_momentum", ("model.batch_norm",), lambda c: c.model.batch_norm, "set model.batch_norm to True"),
  Acts("model.bn_momentum", ("model.frozen_bn",), lambda c: not c.model.frozen_bn, "set model.frozen_bn to False"),
  Acts("model.at_once", ("model.stride",), lambda c: c.model.stride < 32, "set model.stride to 16 or 8"),
  Acts("model.auxiliary", ("loss.auxiliary_weight",), lambda c: c.loss.auxiliary_weight > 0,
       "set loss.auxiliary_weight above 0"),
  Acts("model.separable", ("model.atrous_rates", "model.decoder", "model.details.aspp_conv", "model.details.separable_aspp"),
       lambda c: not _dense_only(c.model), "have a part that could be separable"),
  Acts("model.details.separable_norm", ("model.separable", "model.atrous_rates", "model.decoder"),
       lambda c: c.model.separable and not _dense_only(c.model), "have a separable part"),
  Acts("model.details.separable_aspp", ("model.separable", "model.atrous_rates"),
       lambda c: c.model.separable and bool(c.model.atrous_rates), "set model.separable to True, and atrous_rates"),
  Acts("model.details.pooling_first", ("model.image_pooling",), lambda c: c.model.image_pooling,
       "set model.image_pooling to True"),
  *(Acts(f"model.details.{field}", ("model.decoder",), lambda c: c.model.decoder, "set model.decoder to True")
    for field in ("decoder_convs", "low_level_first", "low_level")),
  Acts("model.details.dilate_first", ("model.output_stride",), lambda c: c.model.output_stride < 32,
       "set model.output_stride to 16 or 8"),
  Acts("augment.scale_step", ("augment.scale",),
       lambda c: len(c.augment.scale) != 2
       or c.augment.scale[1] - c.augment.scale[0] >= (1 - 1e-6) * c.augment.scale_step,
       "only the smallest scale would be drawn: choose a step within the range, or widen augment.scale"),
  Acts("augment.quarter_turns", ("crop_size",), lambda c: len(set(c.crop_size)) == 1,
       "only square crops keep their size when turned: set crop_size to e.g. 512,512; or take augment.rotation"),
  Acts("augment.class_mix", ("batch_size",), lambda c: c.batch_size > 1, "set batch_size to 2 or more"),
  Acts("augment.class_mix", ("model.padding",), lambda c: c.model.padding != "valid",
       "what surrounds an unpadded network's crop has no labels to mix by: set model.padding to same"),
  *(Acts(f"loss.{field}", ("loss.terms",), functools.partial(_names_term, term), f"name {term} in loss.terms")
    for term in options.loss_terms() for field in options.signature("losses.make_loss") if field.startswith(f"{term}_")),
  Acts("loss.border_weight", ("loss.terms",), lambda c: bool(_terms(c) & {"cross_entropy", "bce"}),
       "it weighs the pixels of cross_entropy and bce: name one of them in loss.terms"),
  Acts("loss.class_weights", ("head", "loss.terms"),
       lambda c: c.head != "sigmoid" or not _terms(c) & {"dice", "jaccard", "lovasz"},
       "with one logit, dice, jaccard and lovasz score the foreground alone, so that weights cancel: take them out of"
       " loss.terms, or set head to softmax"),
  Acts("loss.hard_fraction", ("loss.terms",), lambda c: "cross_entropy" in _terms(c),
       "it picks pixels of cross_entropy: name it in loss.terms"),
  Acts("loss.hard_fraction_steps", ("loss.hard_fraction",), lambda c: c.loss.hard_fraction < 1,
       "set loss.hard_fraction below 1"),
  Acts("loss.auxiliary_weight", ("model.name",), lambda c: "auxiliary" in c.model, "choose a model with such a head"),
  Acts("loss.auxiliary_weight", ("model.auxiliary",), lambda c: c.model.auxiliary, "set model.auxiliary to True"),
  Acts("optimizer.poly_power", ("optimizer.schedule",), lambda c: c.optimizer.schedule == "poly",
       "set optimizer.schedule to poly"),
  Acts("optimizer.end_lr", ("optimizer.schedule",), lambda c: c.optimizer.schedule != "constant",
       "choose a schedule that falls"),
  *(Acts(f"optimizer.{field}", ("optimizer.schedule",), lambda c: c.optimizer.schedule == "step",
         "set optimizer.schedule to step") for field in ("decay_every", "decay_factor")),
  *(Acts(f"optimizer.{field}", ("optimizer.warmup_steps",), lambda c: c.optimizer.warmup_steps > 0,
         "set optimizer.warmup_steps") for field in ("warmup", "warmup_lr")),
  Acts("optimizer.nesterov", ("optimizer.name",), lambda c: c.optimizer.name == "sgd", "set optimizer.name to sgd"),
  Acts("optimizer.nesterov", ("optimizer.momentum",), lambda c: c.optimizer.momentum > 0,
       "set optimizer.momentum above 0"),
  Acts("policy.min_gain", ("policy.plateau_factor", "policy.early_stop"),
       lambda c: c.policy.plateau_factor < 1 or c.policy.early_stop > 0,
       "set plateau_factor below 1, or early_stop above 0"),
  Acts("policy.plateau_patience", ("policy.plateau_factor",), lambda c: c.policy.plateau_factor < 1,
       "set policy.plateau_factor below 1"),
  Acts("eval.threshold", ("head",), lambda c: c.head == "sigmoid",
       "a softmax head predicts the most probable class: set head to sigmoid"),
  Acts("eval.window_stride", ("eval.window",), lambda c: any(c.eval.window), "set eval.window"),
  Acts("eval.window_stride", ("model.padding",), lambda c: c.model.padding != "valid",
       "unpadded tiles fit together without overlap: set model.padding to same"),
)  # fmt: skip


def validate(config: config_dict.ConfigDict) -> None:
  """Checks what types cannot express.

  Raises:
    ConfigError: all problems at once, each naming its field, its value and the remedy; first those of types.
  """
  if problem := schema_problem(config):
    raise ConfigError(
      f"model.name = {config.model.name!r} and data.name = {config.data.name!r} do not fit the config's other fields:"
      f" {problem}. Both are chosen in the config file, by default_config(model=..., data=...)."
    )
  leaves = fields(config)
  problems = _wrong_types(config)
  if not problems:
    problems = [f"config.{field} = {leaves[field]!r}: {remedy}" for ok, field, remedy in _rules(config) if not ok]
  if problems:
    raise ConfigError("The config cannot run:\n  " + "\n  ".join(problems))


def idle(config: config_dict.ConfigDict) -> dict[str, str]:
  """The fields that cannot act in this config, at their default or not, with the deciding fields and the remedy."""
  leaves, found = fields(config), {}
  defaults = fields(default_config(config.model.name, config.data.name))
  for row in ACTS:
    if {row.field, *row.deciders} <= leaves.keys() and row.field not in found and not row.when(config):
      deciders = " and ".join(f"{name} = {leaves[name]!r}" for name in row.deciders)
      found[row.field] = (
        f"cannot act with {deciders}: {row.remedy}; or set {row.field} to its default, {defaults[row.field]!r}."
      )
  return found


def _idle(config) -> Rules:
  leaves, defaults = fields(config), fields(default_config(config.model.name, config.data.name))
  for field, remedy in idle(config).items():
    yield leaves[field] == defaults[field], field, remedy


def _rules(config) -> Rules:
  yield from _choices(config)
  yield from _run(config)
  yield from _data(config.data)
  yield from _augmentation(config.augment)
  yield from _loss(config)
  yield from _optimizer(config)
  yield from _policy(config.policy)
  yield from _evaluation(config)
  yield from _idle(config)


def _choices(config) -> Rules:
  leaves = fields(config)
  for field, choices in CHOICES.items():
    if field in leaves:
      choices = choices[config.data.name] if isinstance(choices, dict) else choices
      yield leaves[field] in choices, field, f"choose one of {', '.join(choices)}."


def _is_size(size: tuple, least: int) -> bool:
  return len(size) == 2 and all(isinstance(n, int) and n >= least for n in size)


def _run(config) -> Rules:
  counts = ("num_steps", "batch_size", "accumulate_steps", "keep_checkpoints")
  for field in (*counts, "log_every", "eval_every", "checkpoint_every"):
    yield config[field] >= 1, field, "must be at least 1."
  yield 0 <= config.seed < 2**31, "seed", "must lie in [0, 2^31)."
  yield config.mesh.space >= 1, "mesh.space", "must be at least 1."
  yield config.mesh.data >= 1 or config.mesh.data == -1, "mesh.data", "must be at least 1, or -1 for all devices."
  yield _is_size(config.crop_size, 1), "crop_size", "must be (H, W) in pixels."
  known = options.trackers()
  for name in config.trackers:
    yield name in known, "trackers", f"choose of {', '.join(known)}.{suggest(name, known)}"
  steps = config.profile_steps
  traced = len(steps) == 2 and (steps == (0, 0) or 1 <= steps[0] <= min(steps[1], config.num_steps))
  yield traced, "profile_steps", "must be (first, last), from 1 to num_steps, or (0, 0) for none."


def _data(data) -> Rules:
  named = data.name == "synthetic" or bool(data.dir)
  yield named, "data.dir", "name the data set's root folder, e.g. --config.data.dir=/data/camvid."
  for field in ("train_split", "eval_split"):
    yield bool(data[field]), f"data.{field}", "name a split of the data set, e.g. val."
  yield _is_size(data.canvas_size, 0), "data.canvas_size", "must be (H, W) in pixels."
  if data.name == "synthetic":
    kept = data.cache in ("none", "device")
    yield kept, "data.cache", "keeps decoded files, and this source has none: set it to none, or to device."
    yield _is_size(data.image_size, 1), "data.image_size", "must be (H, W) in pixels."
    for field in ("num_train", "num_val"):
      yield data[field] >= 1, f"data.{field}", "must be at least 1."
  yield data.max_bad_examples >= 0, "data.max_bad_examples", "must be 0 (stop at the first) or more."
  yield data.sampling_temperature > 0, "data.sampling_temperature", "must be above 0; DAFormer has 0.01."
  yield data.workers >= 0, "data.workers", "must be 0 (one per core) or more."
  if "holdout" in data:
    holdout = data.holdout
    share_or_number = 0 < holdout < 1 or (holdout >= 1 and holdout == int(holdout))
    yield share_or_number, "data.holdout", "must lie between 0 and 1 (a share), or be a whole number of images."
    yield data.folds == 0 or data.folds >= 2, "data.folds", "must be 0 (none) or at least 2."
    yield data.folds == 0 or 0 <= data.fold < data.folds, "data.fold", "must lie in [0, data.folds)."
    yield data.split_seed >= 0, "data.split_seed", "must be 0 or more."
  if "channels" in data:
    yield data.channels >= 0, "data.channels", "must be 0 (RGB of 8 bits) or the number of channels."
  if "channels" in data and data.channels > 0:
    for field in ("mean", "std"):
      fits = len(data[field]) in (0, data.channels) and all(isinstance(n, int | float) for n in data[field])
      yield fits, f"data.{field}", "needs a number for each channel, or none."
    yield len(data.std) == len(data.mean), "data.std", "needs as many numbers as data.mean."
    yield all(isinstance(n, str) or n > 0 for n in data.std), "data.std", "must be above 0."
  if data.name == "folder":
    yield data.border_sigma > 0, "data.border_sigma", "must be above 0 pixels."


def _augmentation(augment) -> Rules:
  scale = augment.scale
  yield len(scale) == 2 and 0 < scale[0] <= scale[-1], "augment.scale", "must be (smallest, largest), above 0."
  yield augment.scale_step >= 0, "augment.scale_step", "must be 0 (continuous) or more."
  for field in ("brightness", "contrast", "saturation", "noise", "foreground", "class_mix"):
    yield 0 <= augment[field] <= 1, f"augment.{field}", "must lie in [0, 1]."
  yield 0 <= augment.hue <= 0.5, "augment.hue", "must lie in [0, 0.5], a share of the colour circle."
  hsv = augment.hsv
  yield len(hsv) == 3 and all(0 <= s <= 1 for s in hsv), "augment.hsv", "needs three numbers in [0, 1]."
  for field, limit in (("rotation", 180), ("shear", 80), ("shift", 1), ("zoom", 0.9)):
    yield 0 <= augment[field] <= limit, f"augment.{field}", f"must lie in [0, {limit}]."
  yield 0 <= augment.gamma < 1, "augment.gamma", "must lie in [0, 1)."
  yield 0 <= augment.blur <= 20, "augment.blur", "must lie in [0, 20] pixels."
  yield augment.elastic >= 0, "augment.elastic", "must be 0 (off) or more pixels."


def _loss(config) -> Rules:
  loss = config.loss
  yield loss.focal_gamma >= 0, "loss.focal_gamma", "must be 0 (cross-entropy) or more."
  yield loss.border_weight >= 0, "loss.border_weight", "must be 0 (off) or more."
  yield (
    not loss.border_weight or (config.data.name == "folder" and bool(config.data.instances)),
    "loss.border_weight",
    "wants to know where instances touch: set data.instances of the folder source to their masks, or to"
    ' "components"; or 0.',
  )
  yield 0 < loss.hard_fraction <= 1, "loss.hard_fraction", "must lie in (0, 1]; 1 takes all pixels."
  yield (
    not loss.hard_fraction > 0
    or loss.hard_fraction * config.batch_size * math.prod(config.crop_size) >= config.accumulate_steps,
    "loss.hard_fraction",
    "picks no pixel at all of a batch of this batch_size and crop_size: raise it.",
  )
  yield loss.hard_fraction_steps >= 0, "loss.hard_fraction_steps", "must be 0 (at once) or more."
  weights = loss.class_weights
  named = len(weights) == 1 and weights[0] in ("median_frequency", "inverse_log")
  numbers = all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in weights)
  numbers = numbers and (any(weights) or not weights)
  remedy = 'give one number >= 0 per class, not all 0, ("median_frequency",), ("inverse_log",), or ().'
  yield named or numbers, "loss.class_weights", remedy
  yield loss.auxiliary_weight >= 0, "loss.auxiliary_weight", "must be 0 or more."


def _optimizer(config) -> Rules:
  optimizer = config.optimizer
  yield optimizer.base_lr > 0, "optimizer.base_lr", "must be above 0."
  remedy = "must lie in [0, base_lr); for a rate that does not fall, set optimizer.schedule to constant."
  yield 0 <= optimizer.end_lr < optimizer.base_lr, "optimizer.end_lr", remedy
  yield optimizer.poly_power > 0, "optimizer.poly_power", "must be above 0."
  warmed_up = 0 <= optimizer.warmup_steps < max(config.num_steps, 1)
  remedy = f"must be below num_steps = {config.num_steps}: lower it, e.g. to {max(config.num_steps, 1) // 10}, or train longer."
  yield warmed_up, "optimizer.warmup_steps", remedy
  yield 0 <= optimizer.warmup_lr <= optimizer.base_lr, "optimizer.warmup_lr", "must lie in [0, base_lr]."
  yield (
    optimizer.warmup == "linear" or optimizer.warmup_steps == 0 or optimizer.warmup_lr > 0,
    "optimizer.warmup",
    "stays at warmup_lr = 0, where nothing is learned: set optimizer.warmup_lr above 0, or warmup to linear.",
  )
  yield optimizer.decay_every >= 1, "optimizer.decay_every", "must be at least 1."
  yield (
    optimizer.schedule != "step" or optimizer.warmup_steps + optimizer.decay_every < config.num_steps,
    "optimizer.decay_every",
    "the step schedule would not drop before num_steps: lower it, or set optimizer.schedule to constant.",
  )
  yield 0 < optimizer.decay_factor < 1, "optimizer.decay_factor", "must lie between 0 and 1."
  for field, named in (("optimizer.freeze", optimizer.freeze), ("init.exclude", config.init.exclude)):
    yield all(isinstance(pattern, str) for pattern in named), field, "must hold patterns of parameter paths, as text."
  for text in optimizer.lr_multipliers:
    yield from _accepts(patterns.with_factor, text, "optimizer.lr_multipliers")
  for field in ("momentum", "ema_decay"):
    yield 0 <= optimizer[field] < 1, f"optimizer.{field}", "must lie in [0, 1)."
  for field in ("weight_decay", "clip_norm"):
    yield optimizer[field] >= 0, f"optimizer.{field}", "must be 0 (off) or more."


def _accepts(parse: Callable, value, field: str) -> Rules:
  try:
    parse(value)
  except ConfigError as error:
    yield False, field, str(error)


def _policy(policy) -> Rules:
  yield policy.min_gain > 0, "policy.min_gain", "must be above 0."
  yield 0 < policy.plateau_factor <= 1, "policy.plateau_factor", "must lie in (0, 1]; 1 is off."
  yield policy.plateau_patience >= 1, "policy.plateau_patience", "must be at least 1 evaluation."
  yield policy.early_stop >= 0, "policy.early_stop", "must be 0 (never) or more evaluations."


def _evaluation(config) -> Rules:
  evaluation = config.eval
  yield evaluation.batch_size >= 1, "eval.batch_size", "must be at least 1."
  scales, window, stride = evaluation.scales, evaluation.window, evaluation.window_stride
  yield len(scales) > 0 and all(s > 0 for s in scales), "eval.scales", "needs numbers above 0."
  yield _is_size(window, 0), "eval.window", "must be (H, W) in pixels."
  yield all(window) or not any(window), "eval.window", "must be (0, 0), or both above 0."
  yield _is_size(stride, 0), "eval.window_stride", "must be (H, W) in pixels."
  yield (
    "eval.window_stride" in idle(config) or all(0 < step <= side for step, side in zip(stride, window)),
    "eval.window_stride",
    "must lie between 1 and eval.window, e.g. two thirds of it.",
  )
  yield 0 < evaluation.threshold < 1, "eval.threshold", "must lie between 0 and 1."
  yield evaluation.num_overlays >= 0, "eval.num_overlays", "must be 0 or more."


def _wrong_types(config: config_dict.ConfigDict) -> list[str]:
  """What ml_collections lets pass: None anywhere, numbers that are not finite, and anything inside a tuple."""

  def kind(value) -> str:
    if isinstance(value, float) and not math.isfinite(value):
      return "something else"
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
