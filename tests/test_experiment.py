"""The parts of a config: made when asked for, once, and from what is given."""

import jax
import pytest

from segjax import input_pipeline
from segjax.config import default_config
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError
from tests.experiment import mesh_of


@pytest.fixture
def config():
  """A small U-Net for a data set that is not there."""
  config = default_config(model="unet", data="voc")
  config.data.dir, config.batch_size, config.crop_size = "/nowhere", 8, (16, 16)
  config.model.width, config.model.depth = 2, 1
  return config


def test_what_needs_no_data_set_works_without_one(config):
  experiment = Experiment(config)
  experiment.check()
  state, batch = experiment.abstract_train_arguments((20, 30))
  assert state.params["logits"]["kernel"].shape[-1] == experiment.num_classes == 21
  assert batch["image"].shape == (8, 20, 30, 3) and experiment.network.margin == 0
  with pytest.raises(DataError, match="/nowhere"):
    experiment.train_batches(0, 1)


def test_each_part_is_made_once(monkeypatch):
  made, make_source = [], input_pipeline.make_source
  monkeypatch.setattr(input_pipeline, "make_source", lambda *args: made.append(args[1]) or make_source(*args))
  experiment = Experiment(default_config(data="synthetic"))
  assert made == []
  assert experiment.evaluator is experiment.evaluator and experiment.evaluator.source is experiment.eval_source
  assert experiment.evaluator.step is experiment.eval_step and made == ["val"]


def test_chosen_devices_and_classes_go_before_the_configs(config):
  experiment = Experiment(config, mesh=mesh_of(2, 2), num_classes=3)
  assert experiment.abstract_state.params["logits"]["kernel"].shape[-1] == 3
  devices = {leaf.sharding.mesh.size for leaf in jax.tree.leaves(experiment.abstract_eval_arguments((16, 16)))}
  assert devices == {4}


def test_the_batch_to_compile_for_is_that_which_training_reads():
  config = default_config(model="unet", data="synthetic")
  config.batch_size, config.crop_size, config.data.loader = 8, (16, 16), "grain"
  config.data.update(image_size=(22, 32), num_train=8, workers=1)
  experiment = Experiment(config)
  batch = next(experiment.train_batches(0, 1))
  _, abstract = experiment.abstract_train_arguments((22, 32))
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {k: (v.shape, v.dtype) for k, v in abstract.items()}
