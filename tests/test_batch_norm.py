"""Batch norm over one value of each channel has no variance: refused before anything is trained."""

import re

import pytest

from segjax import train
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.tools import dry_run
from tests.marks import full


def refusal(model, batch_size, accumulate_steps=1, crop_size=(64, 64), **options):
  """What `Experiment.check` says of a config; "" for nothing."""
  config = default_config(model=model, data="synthetic")
  config.batch_size, config.accumulate_steps, config.crop_size = batch_size, accumulate_steps, crop_size
  config.model.update(options)
  try:
    Experiment(config).check()
  except ConfigError as error:
    return str(error)
  return ""


DEEPLAB = dict(model="deeplab_v3plus", backbone="mobilenet_v2")
UNET = dict(model="unet", width=2)


@pytest.mark.parametrize(
  "options, remedy",
  [
    (dict(batch_size=1, **DEEPLAB), "at least 2, or set model.frozen_bn = True or model.image_pooling = False"),
    (dict(batch_size=4, accumulate_steps=4, **DEEPLAB), "batch_size = 4 with accumulate_steps = 4 .* at least 8"),
    (dict(batch_size=1, crop_size=(32, 32), model="dilated_fcn", output_stride=32), "or set model.frozen_bn = True."),
    (dict(batch_size=1, crop_size=(16, 16), **UNET), "or set model.batch_norm = False."),
  ],
)
def test_one_value_of_each_channel_is_refused_with_the_remedies_of_the_model(options, remedy):
  assert re.search(remedy, refusal(**options))


@pytest.mark.parametrize(
  "options",
  [
    dict(batch_size=2, **DEEPLAB),
    dict(batch_size=8, accumulate_steps=4, **DEEPLAB),
    dict(batch_size=1, frozen_bn=True, **DEEPLAB),
    dict(batch_size=1, image_pooling=False, **DEEPLAB),
    dict(batch_size=1, crop_size=(32, 32), **UNET),
    dict(batch_size=1, crop_size=(16, 16), batch_norm=False, **UNET),
    dict(batch_size=1, model="fcn", width=2),
  ],
)
def test_more_values_or_none_of_the_batch_are_not_refused(options):
  assert refusal(**options) == ""


@pytest.mark.parametrize("accumulate_steps", [1, *full(4)])
def test_training_and_a_dry_run_refuse_it_before_the_workdir_is_made(tmp_path, accumulate_steps):
  config = default_config(model="deeplab_v3plus", data="synthetic")
  config.model.backbone, config.crop_size = "mobilenet_v2", (32, 32)
  config.batch_size, config.accumulate_steps, config.mesh.data = accumulate_steps, accumulate_steps, 1
  config.data.update(image_size=(32, 32), num_train=4, num_val=2, loader="grain", workers=1)
  for command in (train.train, dry_run.dry_run):
    with pytest.raises(ConfigError, match="one image at a time"):
      command(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
