"""data.cache = device: the split lies in the devices' memory, and training is the same, bit for bit. On two processes: tests/test_sharding.py."""

import shutil

import jax
import numpy as np
import pytest

from segjax import input_pipeline, sharding
from segjax import train as train_lib
from segjax.config import IGNORE_LABEL, ConfigError
from segjax.config.rules import validate
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, canvas, order
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.run import device_cache
from segjax.tools.dry_run import dry_run
from tests.experiment import assert_same_batches, fetched, make_config, mesh_of
from tests.folder_of_images import folder_of_images
from tests.marks import full
from tests.test_train import assert_identical, checkpoint

MESHES = ((1, 1), (8, 1), (4, 2))


def on_device(config):
  config = config.copy_and_resolve_references()
  config.data.cache = "device"
  return config


@pytest.fixture
def folder(tiny_config, tmp_path):
  """12 images of training, and the weights of their borders."""
  config = folder_of_images(tiny_config, tmp_path / "data")
  config.loss.border_weight = 10.0
  return config


@pytest.mark.parametrize("loader", ["tf_data", "grain"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_step_sees_the_batches_of_the_loaders_bit_for_bit(folder, mesh, loader):
  folder.data.loader = loader
  want = list(Experiment(folder, mesh=mesh_of(*mesh)).train_batches(0, 3))
  assert "border" in want[0]
  assert_same_batches(want, fetched(Experiment(on_device(folder), mesh=mesh_of(*mesh)), 3))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_images_that_are_cut_are_cut_the_same_bit_for_bit(folder, mesh, monkeypatch):
  monkeypatch.setattr(canvas, "MOSTLY", -1.0)  # As if whole images would mostly pad.
  folder.crop_size, folder.augment.scale = (8, 8), (1.0, 1.5)
  experiment = Experiment(folder, mesh=mesh_of(*mesh))
  assert experiment.train_canvas != (24, 32)
  want = list(experiment.train_batches(0, 3))
  assert "origin" in want[0] and want[0]["origin"].any()
  assert_same_batches(want, fetched(Experiment(on_device(folder), mesh=mesh_of(*mesh)), 3))


@pytest.mark.parametrize("data, space", full((1, 1), (8, 1), (4, 2)))
def test_training_ends_in_the_same_parameters_bit_for_bit(data, space):
  config = make_config("shallow_unet", "float32")
  ends = []
  for other in (config, on_device(config)):
    experiment = Experiment(other, mesh=mesh_of(data, space))
    step, state = experiment.make_train_step(), experiment.init_state()
    for batch in experiment.device_batches(0, 3):
      state, metrics = step(state, batch)
    ends.append(jax.device_get((state, metrics)))
  assert_identical(*ends)


def test_each_device_holds_its_share_of_the_split_and_the_step_gathers_no_more_than_a_batch():
  config = on_device(make_config("shallow_unet", "float32"))
  config.data.num_train = 2000
  experiment = Experiment(config, mesh=mesh_of(4, 2))
  state, batch = experiment.abstract_train_arguments((22, 32))
  assert batch.keys() == {"id", "split"}
  share = 2008 // 8 * (22 * 32 * 4 + 8)
  assert sharding.bytes_per_device(batch["split"]) == share
  memory = experiment.make_train_step().lower(state, batch).compile().memory_analysis()
  assert memory.argument_size_in_bytes > share and memory.temp_size_in_bytes < 2 * share


def test_an_example_that_cannot_be_read_is_void_and_recorded_when_its_step_comes(folder, tmp_path):
  (tmp_path / "run").mkdir()
  folder.data.max_bad_examples = 1
  with open(f"{folder.data.dir}/images/train/05.png", "r+b") as file:
    file.truncate(200)
  mesh = mesh_of(4, 2)
  found = fetched(Experiment(on_device(folder), mesh=mesh), 3, BadExamples(tmp_path / "run", most=1))
  bad = BadExamples(tmp_path / "run", most=1)  # As a resumed run reads them.
  want = list(Experiment(folder, mesh=mesh).train_batches(0, 3, bad=bad))
  assert bad.names == ["images/train/05"]
  for step, (a, b) in enumerate(zip(want, found)):
    void = order.train_ids(folder.seed, step, 8, 12) == 5
    assert ((b["label"] == IGNORE_LABEL).all((1, 2)) == void).all() and (b["id"][void] == order.PADDING).all()
    assert_same_batches([a | dict(id=b["id"])], [b])
  with pytest.raises(DataError, match=r"1 training examples cannot be read: images/train/05(.|\n)*max_bad_examples"):
    fetched(Experiment(on_device(folder), mesh=mesh), 1, BadExamples(tmp_path, most=0))


def test_an_example_that_was_bad_before_is_void_again_though_it_can_be_read(folder, tmp_path):
  first = order.train_ids(folder.seed, 1, 8, 12)
  bad = BadExamples(tmp_path, most=1)
  bad.add(1, 3, f"images/train/{first[3]:02d}", DataError("away"))
  found = fetched(Experiment(on_device(folder), mesh=mesh_of(8)), 2, bad)
  assert ((found[1]["label"] == IGNORE_LABEL).all((1, 2)) == (np.arange(8) == 3)).all()
  assert not (found[0]["label"] == IGNORE_LABEL).all((1, 2)).any()


@pytest.mark.full
def test_a_run_resumes_and_changes_to_the_device_and_back_with_the_same_bits(tiny_config, tmp_path):
  """From the host to step 3, on the device to 6; and the other way round."""
  ends = []
  for name, caches in (("there", ("none", "device")), ("back", ("device", "none"))):
    for tiny_config.data.cache, tiny_config.num_steps in zip(caches, (3, 6)):
      train_lib.train(tiny_config, tmp_path / name)
    ends.append(checkpoint(tmp_path / name, 6))
  assert_identical(*ends)
  shutil.rmtree(tmp_path / "there/checkpoints/step_6")
  tiny_config.data.cache = "device"
  train_lib.train(tiny_config, tmp_path / "there")
  assert_identical(ends[0], checkpoint(tmp_path / "there", 6))


def test_a_split_too_large_for_the_devices_is_refused_with_remedies_before_it_is_read(monkeypatch, tiny_config):
  experiment = Experiment(on_device(tiny_config))
  monkeypatch.setattr(sharding, "device_memory", lambda device: (20_000, "memory"))
  monkeypatch.setattr(input_pipeline, "load_example", None)
  remedy = r"data.cache = device: training needs .* there are 0.00 GB \(memory\). Set data.cache=memory, disk or none"
  with pytest.raises(ConfigError, match=remedy):
    experiment.device_batches(0, 1)
  step = jax.jit(lambda state, batch: state + batch["split"].sum(), donate_argnums=0)
  sound = sharding.replicated(experiment.mesh)
  state = jax.ShapeDtypeStruct((), np.float32, sharding=sound)
  for size, fits in ((100, True), (100_000, False)):
    batch = dict(split=jax.ShapeDtypeStruct((size,), np.float32, sharding=sound))
    if fits:
      device_cache.compile_step(step, state, batch, experiment.mesh)
    else:
      with pytest.raises(ConfigError, match=remedy):
        device_cache.compile_step(step, state, batch, experiment.mesh)


@pytest.mark.full
def test_the_dry_run_counts_the_split_once(tiny_config, capsys):
  programs, needed = [], []
  for config in (tiny_config, on_device(tiny_config)):
    config.data.num_train = 20_000
    programs.append(dry_run(config)["train"])
    output = capsys.readouterr().out
    needed.append(float(output.split("needs at most ")[1].split(" MiB")[0].replace(",", "")))
  split = 20_001 * (24 * 32 * 4 + 8)
  assert f"the training split takes {split / 2**20:.1f} MiB of each device" in output
  assert programs[1].arguments - programs[0].arguments == pytest.approx(split, rel=0.02)
  assert needed[1] - needed[0] == pytest.approx(split / 2**20, rel=0.01)


def test_of_the_caches_generated_examples_may_have_the_device_alone(tiny_config):
  on_the_device = on_device(tiny_config)
  assert on_the_device.data.name == "synthetic" and validate(on_the_device) is None
  on_the_device.data.cache = "disk"
  with pytest.raises(ConfigError, match="config.data.cache.*set it to none, or to device"):
    validate(on_the_device)
