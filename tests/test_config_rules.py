"""Fields that cannot act: refused unless they are at their default, whatever model and data set; and other traps."""

import importlib
import pathlib

import pytest

from segjax import config as config_lib
from segjax import optimizer
from segjax.config import ConfigError, default_config, options
from segjax.config import rules as config_rules
from segjax.losses import TERMS
from segjax.run import workdir

CONFIGS = sorted(p.stem for p in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
# Fields that no other field can keep from acting. A new field goes here, or gets a row in config_rules.ACTS, but for a
# model's: its constructor refuses what does not fit.
ALWAYS = """
seed num_steps batch_size accumulate_steps crop_size dtype log_every eval_every checkpoint_every keep_checkpoints head
mesh.data mesh.space remat kernels profile_steps trackers
data.name data.train_split data.eval_split data.loader data.workers data.canvas_size data.num_train data.num_val
data.image_size data.images data.masks data.mask_suffix data.list data.classes data.colors data.label_map data.format
data.cache data.exif data.sampling data.channels data.labels data.dataset data.image_feature data.mask_feature data.id_feature
augment.scale augment.flip augment.rotation augment.shear augment.shift augment.zoom augment.elastic augment.outside
augment.flip_vertical augment.foreground augment.blur
loss.terms optimizer.name optimizer.base_lr optimizer.schedule optimizer.warmup_steps optimizer.momentum
optimizer.weight_decay optimizer.freeze optimizer.lr_multipliers optimizer.clip_norm optimizer.ema_decay
policy.metric policy.plateau_factor policy.early_stop
eval.batch_size eval.scales eval.flip eval.window eval.outside eval.checkpoint eval.num_overlays
init.path init.scheme init.exclude init.unfold
""".split()

DEEPLAB, FCN = ("deeplab_v3plus", "folder"), ("fcn", "folder")
UNET, GENERATED = ("unet", "folder"), ("unet", "synthetic")
FLAT = {"data.images": "images", "data.masks": "masks"}
STEP = {"optimizer.schedule": "step", "optimizer.decay_every": 300}
SIGMOID = {"head": "sigmoid", "loss.terms": ("bce",)}
MEASURED = {"data.channels": 2, "data.mean": (1.0, 2.0), "data.std": (0.5, 0.25)}
WEIGHTED = {"data.instances": "components", "loss.border_weight": 10.0}

# Model and data, a config in which the field acts, and what keeps it from doing so.
CASES = [
  ("matmul_precision", UNET, {"matmul_precision": "highest"}, {"dtype": "bfloat16"}),
  ("shard_state", UNET, {"shard_state": True}, {"mesh.data": 1}),
  ("data.dir", UNET, {"data.dir": "/data"}, GENERATED),
  ("data.max_bad_examples", UNET, {"data.max_bad_examples": 2}, GENERATED),
  (
    "data.sampling_temperature",
    UNET,
    {"data.sampling": "class_balanced", "data.sampling_temperature": 0.1},
    {"data.sampling": "uniform"},
  ),
  ("augment.quarter_turns", UNET, {"augment.quarter_turns": True}, {"crop_size": (256, 128)}),
  ("augment.class_mix", UNET, {"augment.class_mix": 0.5}, {"batch_size": 1}),
  ("augment.class_mix", UNET, {"augment.class_mix": 0.5}, {"model.padding": "valid"}),
  ("data.holdout", UNET, FLAT | {"data.holdout": 20.0}, {"data.images": "images/{split}"}),
  ("data.folds", UNET, FLAT | {"data.folds": 5}, {"data.masks": "{split}annot"}),
  ("data.split_seed", UNET, FLAT | {"data.split_seed": 1}, {"data.list": "{split}.txt"}),
  ("data.group", UNET, FLAT | {"data.group": "^[^_]+"}, {"data.list": "all.txt"}),
  ("data.holdout", UNET, FLAT | {"data.holdout": 20.0}, {"data.folds": 5}),
  ("data.holdout", ("fcn", "kitti_road"), {"data.holdout": 0.5}, {"data.folds": 5}),
  ("data.fold", UNET, FLAT | {"data.folds": 5, "data.fold": 1}, {"data.folds": 0}),
  (
    "data.void_colors",
    UNET,
    {"data.colors": ("000000", "FF0000"), "data.void_colors": ("FFFFFF",)},
    {"data.colors": ()},
  ),
  ("data.depth", UNET, {"data.channels": 2, "data.depth": "uint16"}, {"data.channels": 0}),
  ("data.mean", UNET, MEASURED, {"data.channels": 0}),
  ("data.std", UNET, MEASURED, {"data.channels": 0}),
  *(
    (f"augment.{field}", UNET, {f"augment.{field}": value}, {"data.channels": 1})
    for field, value in dict.fromkeys(("brightness", "contrast", "saturation", "hue", "gamma", "noise"), 0.1).items()
  ),
  ("augment.hsv", UNET, {"augment.hsv": (0.1, 0.1, 0.1)}, {"data.channels": 1}),
  ("data.instances", UNET, WEIGHTED, {"loss.border_weight": 0.0}),
  ("data.border_sigma", UNET, WEIGHTED | {"data.border_sigma": 3.0}, {"loss.border_weight": 0.0}),
  ("model.bn_momentum", UNET, {"model.bn_momentum": 0.99}, {"model.batch_norm": False}),
  ("model.bn_momentum", DEEPLAB, {"model.bn_momentum": 0.9}, {"model.frozen_bn": True}),
  ("model.at_once", FCN, {"model.at_once": True}, {"model.stride": 32}),
  ("model.auxiliary", DEEPLAB, {"model.auxiliary": True}, {"loss.auxiliary_weight": 0.0}),
  ("model.separable", DEEPLAB, {"model.separable": False, "model.atrous_rates": ()}, {"model.decoder": False}),
  ("model.details.separable_norm", DEEPLAB, {"model.details.separable_norm": False}, {"model.separable": False}),
  ("model.details.separable_aspp", DEEPLAB, {"model.details.separable_aspp": False}, {"model.atrous_rates": ()}),
  ("model.details.pooling_first", DEEPLAB, {"model.details.pooling_first": False}, {"model.image_pooling": False}),
  ("model.details.decoder_convs", DEEPLAB, {"model.details.decoder_convs": 1}, {"model.decoder": False}),
  ("model.details.low_level_first", DEEPLAB, {"model.details.low_level_first": True}, {"model.decoder": False}),
  ("model.details.low_level", DEEPLAB, {"model.details.low_level": "layer_4"}, {"model.decoder": False}),
  ("model.details.dilate_first", DEEPLAB, {"model.details.dilate_first": True}, {"model.output_stride": 32}),
  (
    "augment.scale_step",
    UNET,
    {"augment.scale": (0.9, 1.15), "augment.scale_step": 0.25},
    {"augment.scale": (0.9, 1.1)},
  ),
  *(
    (
      f"loss.{field}",
      UNET,
      {"loss.terms": (f"{term}:2", "cross_entropy"), f"loss.{field}": default / 2},
      {"loss.terms": ("cross_entropy",)},
    )
    for term in TERMS
    for field, (default, _) in options.signature("losses.make_loss").items()
    if field.startswith(f"{term}_")
  ),
  ("loss.border_weight", UNET, WEIGHTED, {"loss.terms": ("focal",)}),
  ("loss.class_weights", UNET, SIGMOID | {"loss.class_weights": (1.0, 0.0)}, {"loss.terms": ("bce", "dice")}),
  (
    "loss.class_weights",
    UNET,
    {"loss.terms": ("lovasz",), "loss.class_weights": ("inverse_log",)},
    {"head": "sigmoid"},
  ),
  ("loss.hard_fraction", UNET, {"loss.hard_fraction": 0.5}, {"loss.terms": ("focal",)}),
  (
    "loss.hard_fraction_steps",
    UNET,
    {"loss.hard_fraction": 0.5, "loss.hard_fraction_steps": 9},
    {"loss.hard_fraction": 1.0},
  ),
  (
    "loss.auxiliary_weight",
    DEEPLAB,
    {"model.auxiliary": True, "loss.auxiliary_weight": 0.1},
    {"model.auxiliary": False},
  ),
  ("loss.auxiliary_weight", DEEPLAB, {"model.auxiliary": True, "loss.auxiliary_weight": 0.1}, FCN),
  ("optimizer.poly_power", UNET, {"optimizer.poly_power": 0.5}, {"optimizer.schedule": "cosine"}),
  ("optimizer.end_lr", UNET, {"optimizer.end_lr": 1e-4}, {"optimizer.schedule": "constant"}),
  ("optimizer.decay_every", UNET, STEP, {"optimizer.schedule": "poly"}),
  ("optimizer.decay_factor", UNET, STEP | {"optimizer.decay_factor": 0.5}, {"optimizer.schedule": "cosine"}),
  (
    "optimizer.warmup",
    UNET,
    {"optimizer.warmup_steps": 9, "optimizer.warmup": "constant", "optimizer.warmup_lr": 1e-3},
    {"optimizer.warmup_steps": 0},
  ),
  (
    "optimizer.warmup_lr",
    UNET,
    {"optimizer.warmup_steps": 9, "optimizer.warmup_lr": 1e-3},
    {"optimizer.warmup_steps": 0},
  ),
  ("optimizer.nesterov", UNET, {"optimizer.nesterov": True}, {"optimizer.name": "adamw"}),
  ("optimizer.nesterov", UNET, {"optimizer.nesterov": True}, {"optimizer.momentum": 0.0}),
  ("policy.min_gain", UNET, {"policy.early_stop": 3, "policy.min_gain": 0.01}, {"policy.early_stop": 0}),
  (
    "policy.plateau_patience",
    UNET,
    {"policy.plateau_factor": 0.1, "policy.plateau_patience": 2},
    {"policy.plateau_factor": 1.0},
  ),
  ("eval.threshold", UNET, SIGMOID | {"eval.threshold": 0.3}, {"head": "softmax"}),
  ("eval.window_stride", UNET, {"eval.window": (64, 64), "eval.window_stride": (48, 48)}, {"eval.window": (0, 0)}),
  ("eval.window_stride", UNET, {"eval.window": (64, 64), "eval.window_stride": (48, 48)}, {"model.padding": "valid"}),
]


def make(schema, changes):
  """A config of (model, data) with these values, where it has such fields."""
  config = default_config(*schema)
  known = config_lib.fields(config)
  changes = ({} if schema[1] == "synthetic" else {"data.dir": "/data"}) | changes
  for field, value in changes.items():
    section, _, leaf = field.rpartition(".")
    if field in known:
      target = config
      for part in section.split(".") if section else ():
        target = target[part]
      target[leaf] = value
  return config


def problems(config):
  try:
    config_rules.validate(config)
  except ConfigError as error:
    return str(error).split("\n  ")[1:]
  return []


def spoiled(case):
  """The schema and values of a case with what keeps its field from acting."""
  _, schema, changes, spoil = case
  return (spoil, changes) if isinstance(spoil, tuple) else (schema, changes | spoil)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_field_that_cannot_act_is_refused_with_both_names_unless_at_its_default(case):
  field, schema, changes, _ = case
  assert problems(make(schema, changes)) == []
  schema, changes = spoiled(case)
  config = make(schema, changes)
  found = [line for line in problems(config) if line.startswith(f"config.{field} = ")]
  rows = [row for row in config_rules.ACTS if row.field == field and f"{row.deciders[0]} = " in found[0]]
  assert len(found) == 1 and "cannot act with" in found[0] and rows
  default = config_lib.fields(default_config(*schema))[field]
  assert found[0].endswith(f"or set {field} to its default, {default!r}.")
  assert not any(line.startswith(f"config.{field} = ") for line in problems(make(schema, changes | {field: default})))


def test_every_row_has_a_case_and_every_field_a_row_or_a_place_among_those_that_always_act():
  met = set()
  for case in CASES:
    config = make(*spoiled(case))
    known = config_lib.fields(config).keys()
    met |= {
      (row.field, row.deciders)
      for row in config_rules.ACTS
      if row.field == case[0] and {row.field, *row.deciders} <= known and not row.when(config)
    }
  assert met == {(row.field, row.deciders) for row in config_rules.ACTS}
  known = {
    field
    for model in config_lib.MODELS
    for data in config_lib.SOURCES
    for field in config_lib.fields(default_config(model, data))
  }
  conditional = {row.field for row in config_rules.ACTS}
  decided = conditional | {field for field in known if field in ALWAYS or field.startswith("model.")}
  assert known == decided and not conditional & set(ALWAYS)
  assert {name for row in config_rules.ACTS for name in row.deciders} <= known


def test_defaults_of_every_model_and_data_set_are_accepted():
  for model in config_lib.MODELS:
    for data in config_lib.SOURCES:
      assert problems(make((model, data), {})) == [], (model, data)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_phase_of_a_shipped_config_is_accepted(name):
  module = importlib.import_module(f"configs.{name}")
  phases = dict(deeplab_voc=("trainaug", "trainval"), fcn8_voc=("32s", "16s", "8s", "at_once"))
  phases |= dict(unet_voc=("scratch", "resnet34"), deeplab_camvid_half=("scratch", "imagenet"))
  phases["deeplab_voc_part"] = ("imagenet", "frozen", "official", "scratch")
  phases["fcn8_cityscapes"] = phases["fcn8_voc"]
  for arguments in [(phase,) for phase in phases[name]] if name in phases else [()]:
    config = module.get_config(*arguments)
    if config.data.name != "synthetic":
      config.data.dir = "/data"
    assert problems(config) == []


def test_schedules_are_the_same_whatever_the_fields_that_cannot_act():
  """The table's claims about the learning rate, against the schedule itself."""
  others = {
    "poly_power": 0.5,
    "end_lr": 0.004,
    "decay_every": 7,
    "decay_factor": 0.3,
    "warmup": "constant",
    "warmup_lr": 0.002,
  }

  def rates(config):
    o = config.optimizer
    options = {name: o[name] for name in (*others, "base_lr", "warmup_steps")}
    return [float(optimizer.make_schedule(o.schedule, num_steps=30, **options)(step)) for step in range(30)]

  for schedule in ("poly", "cosine", "step", "constant"):
    for warmup_steps in (0, 4):
      given = {"optimizer.schedule": schedule, "optimizer.warmup_steps": warmup_steps, "optimizer.end_lr": 1e-3}
      given |= {"optimizer.decay_every": 9, "optimizer.warmup_lr": 1e-3}
      config = make(UNET, given)
      before, idle = rates(config), config_rules.idle(config)
      for name, value in others.items():
        changed = rates(make(UNET, given | {f"optimizer.{name}": value}))
        assert (changed == before) == (f"optimizer.{name}" in idle), (schedule, warmup_steps, name)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"optimizer.warmup": "constant", "optimizer.warmup_steps": 9},
      "config.optimizer.warmup = .*set optimizer.warmup_lr",
    ),
    (
      {"optimizer.end_lr": 0.01},
      r"optimizer.end_lr = 0.01: must lie in \[0, base_lr\); .*set optimizer.schedule to constant",
    ),
    ({"optimizer.schedule": "step"}, "optimizer.decay_every = 2000: the step schedule would not drop before num_steps"),
    (
      {"optimizer.schedule": "step", "optimizer.decay_every": 9, "optimizer.decay_factor": 1.0},
      "must lie between 0 and 1",
    ),
    ({"loss.class_weights": (0.0, 0.0)}, "loss.class_weights = .*: give one number >= 0 per class, not all 0"),
    ({"loss.hard_fraction": 1e-6, "crop_size": (8, 8)}, "loss.hard_fraction = 1e-06: picks no pixel"),
    ({"profile_steps": (2000, 2001)}, r"profile_steps = \(2000, 2001\): must be \(first, last\), from 1 to num_steps"),
    ({"optimizer.base_lr": float("inf")}, "optimizer.base_lr = inf: must hold a number"),
    ({"augment.scale": (0.5, float("nan"))}, "augment.scale = .*: must hold a number"),
    ({"eval.window": (64, 64)}, r"eval.window_stride = \(0, 0\): must lie between 1 and eval.window"),
  ],
)
def test_values_with_which_nothing_would_happen_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    config_rules.validate(make(UNET, changes))


def test_a_run_saved_with_an_idle_value_goes_on_once_that_is_at_its_default(tmp_path):
  saved = make(UNET, {"loss.focal_gamma": 1.0, "optimizer.decay_every": 7})
  config_lib.save(saved, tmp_path)
  with workdir.claim_workdir(make(UNET, {}), tmp_path, print):
    assert config_lib.load(tmp_path).loss.focal_gamma == 2.0
  with pytest.raises(ConfigError, match="loss.focal_gamma: 2.0 -> 1.0"):
    workdir.claim_workdir(make(UNET, {"loss.terms": ("focal",), "loss.focal_gamma": 1.0}), tmp_path, print)
