"""The schema: what is refused, what is saved, and that every field means something."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re

import jax
import numpy as np
import pytest

from segjax import config as config_lib
from segjax import losses, models, optimizer, sharding
from segjax.config import ConfigError, default_config, options
from segjax.config import rules as config_rules
from segjax.experiment import Experiment
from segjax.input_pipeline import sources
from tests import command
from tests.marks import full

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


def run(*arguments):
  """(exit code, stdout, stderr)"""
  return command.run("segjax.main", *arguments, cwd=ROOT)


def test_misspelt_field_in_a_config_file_is_refused_with_a_suggestion():
  config = default_config()
  with pytest.raises(AttributeError, match='Did you mean "num_steps"'):
    config.num_step = 3
  with pytest.raises(AttributeError):
    config.optimizer.base_rl = 0.1
  with pytest.raises(TypeError):
    config.batch_size = 8.5


def test_misspelt_field_on_the_command_line_is_refused_with_a_suggestion(tmp_path):
  base = ("--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}")
  for argument, message in (
    ("--config.num_step=3", "config.num_step: no such field. Did you mean num_steps?"),
    ("--config.base_lr=3", "config.base_lr: no such field. Did you mean optimizer.base_lr?"),
    ("--config.num_steps=many", "num_steps=many"),
    ("--config.data.loader=torch", "config.data.loader = 'torch': choose one of tf_data, grain."),
    ("--worckdir=x", "worckdir"),
  ):
    code, _, err = run(*base, argument)
    assert code == 2 and message in err and "Traceback" not in err, err
  assert not (tmp_path / "run").exists()


def test_missing_config_file_and_workdir_say_so(tmp_path):
  code, _, err = run("--config=configs/quickstat.py", f"--workdir={tmp_path}")
  assert code == 2 and "quickstat.py" in err and "Traceback" not in err
  code, _, err = run(f"--workdir={tmp_path / 'none'}", "--mode=eval")
  assert code == 2 and "is not the workdir of a run" in err


def test_validate_reports_all_problems_at_once():
  config = default_config(data="folder")
  config.batch_size, config.crop_size, config.optimizer.momentum = 0, (1, 2, 3), 1.5
  config.optimizer.schedule, config.augment.scale = "steps", (2.0, 0.5)
  with pytest.raises(ConfigError) as error:
    config_rules.validate(config)
  for field in ("batch_size", "crop_size", "data.dir", "optimizer.momentum", "optimizer.schedule", "augment.scale"):
    assert f"config.{field} = " in str(error.value)


def test_unknown_model_or_source_lists_the_known_ones():
  with pytest.raises(ConfigError, match=f"model.name: 'vnet' is none of {', '.join(models.MODELS)}"):
    default_config(model="vnet")
  with pytest.raises(ConfigError, match="data.name: 'coco' is none of synthetic, folder"):
    default_config(data="coco")


def test_command_line_lists_become_tuples():
  config = default_config()
  config.data.classes = ("road,car", "sky")
  assert config_lib.finalize(config).data.classes == ("road", "car", "sky")


def test_saved_config_comes_back_whole(tmp_path, tiny_config):
  config_lib.save(tiny_config, tmp_path)
  assert config_lib.fields(config_lib.load(tmp_path)) == config_lib.fields(tiny_config)
  assert config_lib.differences(tiny_config, config_lib.load(tmp_path)) == []


def test_differences_name_the_fields_and_spare_the_harmless_ones(tiny_config):
  other = tiny_config.copy_and_resolve_references()
  other.num_steps, other.log_every, other.data.loader, other.mesh.data = 99, 7, "grain", 4
  assert config_lib.differences(other, tiny_config) == []
  other.optimizer.base_lr, other.seed = 0.5, 3
  assert config_lib.differences(other, tiny_config) == ["optimizer.base_lr: 0.01 -> 0.5", "seed: 0 -> 3"]


def test_harmless_names_exist():
  known = {field for name in config_lib.SOURCES for field in config_lib.fields(default_config(data=name))}
  for name in config_lib.HARMLESS:
    assert name in known or any(field.startswith(name + ".") for field in known), name


def test_config_of_another_version_is_refused(tmp_path):
  text = config_lib.to_json(default_config()).replace('"log_every"', '"log_period"')
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ConfigError, match=r"unknown \['log_period'\], missing \['log_every'\]"):
    config_lib.load(tmp_path)


def test_model_and_source_options_are_their_constructors_arguments():
  for name, values in config_lib.MODELS.items():
    parameters = inspect.signature(models.MODELS[name].__init__).parameters
    assert set(values) == set(parameters) - {"self", "num_classes", "channels", "dtype", "rngs"}, name
    for option, value in values.items():
      assert value == parameters[option].default, (name, option)
  for name, values in config_lib.SOURCES.items():
    taken = {p.name: p.default for p in inspect.signature(sources.SOURCES[name]).parameters.values()}
    for group in [group for group, default in taken.items() if dataclasses.is_dataclass(default)]:
      taken |= dataclasses.asdict(taken.pop(group))
    assert {"dir", "split", "exif", *values} == set(taken), name
    assert all(values[option] == taken[option] for option in values), name
  assert config_lib.MODELS.keys() == models.MODELS.keys()
  assert config_lib.SOURCES.keys() == sources.SOURCES.keys()


def test_every_source_class_in_the_folder_can_be_chosen():
  texts = [path.read_text() for path in pathlib.Path(sources.__file__).parent.glob("*.py")]
  found = {name for text in texts for name in re.findall(r"(?m)^class (\w+Source)\b", text)}
  assert found == {source.__name__ for source in sources.SOURCES.values()}


def test_a_parameter_of_a_loss_reaches_it_and_acts_only_where_its_term_is_named(monkeypatch):
  """By its name alone, `TERM_PARAMETER`: config, rules and experiment name no parameter of a loss."""
  given = {}
  monkeypatch.setattr(losses, "make_loss", lambda **keywords: given.update(keywords))
  config = default_config(data="synthetic")
  config.loss.terms, config.loss.focal_gamma = ("focal",), 3.5
  Experiment(config).make_train_step()
  expected = dict(config.loss, class_weights=None, ignore_label=config_lib.IGNORE_LABEL)
  assert given == expected
  rows = {row.field: row.when(config) for row in config_rules.ACTS if row.field.startswith("loss.focal")}
  assert rows == {"loss.focal_gamma": True}


def test_a_model_is_called_as_its_file_and_needs_no_entry_in_a_table(tmp_path, monkeypatch):
  (tmp_path / "models").mkdir()
  (tmp_path / "models/own.py").write_text("class Head(base.Block): pass\nclass Own(base.Network): pass\n")
  monkeypatch.setattr(options, "_PACKAGE", tmp_path)
  assert options.networks() == {"own": "models.own.Own"}


def test_the_table_has_each_field_with_its_meaning_and_the_documentation_is_the_table():
  table = options.table()
  rows = {line.split("|")[1].split()[0]: line.split("|")[4].strip() for line in table.splitlines()[6:]}
  every = (default_config(model, data) for model in config_lib.MODELS for data in config_lib.SOURCES)
  assert set(rows) == {field for config in every for field in config_lib.fields(config)}
  assert all(len(meaning) > 4 for meaning in rows.values())
  assert (ROOT / "docs/options.md").read_text() == table, "segjax config --options > docs/options.md"


@pytest.mark.parametrize(
  "text", ['def f(*, a=1):\n  "Args:\\n  b: it."', 'def f(*, a=g()):\n  "Args:\\n  a: it."', "def f(*, a=1): pass"]
)
def test_an_option_without_meaning_or_with_a_computed_default_is_refused(text, tmp_path, monkeypatch):
  monkeypatch.setattr(options, "_PACKAGE", tmp_path)
  (tmp_path / "own.py").write_text(text)
  with pytest.raises(TypeError, match="own.f: a needs a literal default, and an entry in the docstring"):
    options.signature("own.f")


def test_every_field_is_read_somewhere():
  """A field is read as an attribute named like it; options of models, sources, loss and optimiser by who takes them."""
  attributes = {
    path: {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    for path in (ROOT / "segjax").rglob("*.py")
    if path.parent.name != "config"
  }
  read = set.union(*attributes.values())
  augmentation = set.union(*(found for path, found in attributes.items() if path.parent.name == "augment"))
  of_loss = inspect.signature(losses.make_loss).parameters
  of_optimizer = {
    *inspect.signature(optimizer.make_schedule).parameters,
    *inspect.signature(optimizer.make_optimizer).parameters,
  }
  for name in config_lib.SOURCES:
    for field in config_lib.fields(default_config(data=name)):
      section, _, leaf = field.rpartition(".")
      constructed = section == "model" or (section == "data" and leaf in config_lib.SOURCES[name])
      constructed |= (section == "loss" and leaf in of_loss) or (section == "optimizer" and leaf in of_optimizer)
      assert constructed or leaf in (augmentation if section == "augment" else read), f"nobody reads config.{field}"


def test_every_option_of_schedule_and_optimizer_reaches_its_function_and_no_other(monkeypatch):
  given = {}
  for name in ("make_schedule", "make_optimizer"):
    monkeypatch.setattr(optimizer, name, lambda *_, name=name, **keywords: given.update({name: keywords}))
  config = default_config(data="synthetic")
  config.optimizer.update(poly_power=0.7, momentum=0.6)
  experiment = Experiment(config)
  assert experiment.schedule is None and experiment.optimizer is None
  of_schedule, of_optimizer = given["make_schedule"], given["make_optimizer"]
  assert (of_schedule["poly_power"], of_optimizer["momentum"]) == (0.7, 0.6)
  assert of_schedule.keys() | of_optimizer.keys() == set(config.optimizer) - {
    "name",
    "schedule",
    "ema_decay",
    "freeze",
  } | {"num_steps"}
  assert not of_schedule.keys() & of_optimizer.keys()


# Of one model the others differ in the head, the loss, the augmentation and the protocol; a DeepLab takes longest to trace.
SLOW_TO_TRACE = ("deeplab_camvid", "deeplab_cityscapes", "deeplab_voc", "unet_camvid_half", "unet_carvana")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in SLOW_TO_TRACE] + full(*SLOW_TO_TRACE))
def test_every_shipped_config_builds_and_traces_the_steps_of_its_run(name):
  config = config_lib.finalize(importlib.import_module(f"configs.{name}").get_config())
  config.data.dir = "" if config.data.name == "synthetic" else "/data"
  config_rules.validate(config)
  known = dict(synthetic=6, voc=21, cityscapes=19, kitti_road=2)
  num_classes = known[config.data.name] if config.data.name in known else len(config.data.classes) or 2
  experiment = Experiment(config, mesh=sharding.make_mesh(devices=jax.devices()[:1]), num_classes=num_classes)
  experiment.check()
  weights = np.ones(num_classes, np.float32) if config.loss.class_weights else None
  canvas, abstract = (60, 80), experiment.abstract_state
  after, _ = jax.eval_shape(experiment.make_train_step(weights), *experiment.abstract_train_arguments(canvas))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
  out = jax.eval_shape(experiment.eval_step, *experiment.abstract_eval_arguments(canvas))
  assert out["confusion"].shape == (num_classes, num_classes)
  assert out["prediction"].shape == (config.eval.batch_size, *canvas)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_opens_with_its_command(name):
  header = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
  assert re.search(rf"python -m segjax.main --config=configs/{name}.py .*--workdir=", header)


def test_phases_of_deeplab_voc_and_what_a_wrong_one_says(tmp_path):
  from configs import deeplab_voc

  first, second = deeplab_voc.get_config(), deeplab_voc.get_config("trainval")
  changed = {line.partition(":")[0] for line in config_lib.differences(second, first)}
  assert changed == {"data.train_split", "model.output_stride", "model.frozen_bn", "optimizer.base_lr"}
  code, _, err = run("--config=configs/deeplab_voc.py:train", f"--workdir={tmp_path / 'run'}", "--config.data.dir=x")
  assert code == 2 and "phase 'train': choose trainaug or trainval" in err
  code, _, err = run(
    "--config=configs/deeplab_voc.py:trainval", f"--workdir={tmp_path / 'run'}", "--config.data.dir=/nowhere"
  )
  assert code == 2 and "data.dir = /nowhere: no folder JPEGImages" in err
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("holdout", [0.0, -1.0, 1.5])
def test_a_holdout_is_a_share_or_a_whole_number(holdout):
  config = default_config(data="folder")
  config.data.dir, config.data.images, config.data.masks, config.data.holdout = "/data", "images", "masks", 20
  config_rules.validate(config)
  config.data.holdout = holdout
  with pytest.raises(
    ConfigError, match=r"config.data.holdout = .*: must lie between 0 and 1 \(a share\), or be a whole"
  ):
    config_rules.validate(config)
