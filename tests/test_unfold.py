"""`init.unfold`: running statistics for weights whose batch norm was folded away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import steps
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.pretrained import unfold
from tests import seeded
from tests.test_tf_deeplab import folded


@pytest.fixture
def config(tmp_path):
  """DeepLab on MobileNetV2 with folded weights of 21 classes, and four generated images that are one batch."""
  config = default_config(model="deeplab_v3plus", data="synthetic")
  config.model.update(backbone="mobilenet_v2", atrous_rates=(), decoder=False, output_stride=32)
  config.mesh.data, config.batch_size, config.data.workers = 2, 4, 1
  config.crop_size = config.data.image_size = (65, 65)
  config.data.num_train, config.augment.scale, config.augment.flip = 4, (1.0, 1.0), False
  np.savez(tmp_path / "folded.npz", **folded(seeded.arrays("mobilenetv2")))
  config.init.path, config.init.scheme = str(tmp_path / "folded.npz"), "tf_deeplab"
  return config


def test_unfolding_changes_no_logit_and_batch_statistics_then_give_them_too(config):
  """With all images in one batch, its statistics are theirs, layer by layer."""
  experiment = Experiment(config, num_classes=21)
  folded_state, _ = experiment.first_state()
  config.init.unfold = True
  state, line = experiment.first_state()
  assert line.endswith("; batch norm by the statistics of 4 training images (init.unfold)")
  images = jnp.float32([experiment.train_source[n][0] for n in range(4)])

  @jax.jit
  def logits(variables):
    model = steps.merge(experiment.graphdef, variables)
    return tuple(model(model.preprocess(images), train=train) for train in (False, True))

  before, by_batch_before = logits(folded_state.variables())
  after, by_batch = logits(state.variables())
  np.testing.assert_allclose(after, before, atol=1e-4)
  np.testing.assert_allclose(by_batch, before, atol=1e-3)
  assert np.abs(by_batch_before - before).max() > 1
  assert np.ptp(np.asarray(state.batch_stats["backbone"]["layer_1"]["norm"]["var"])) > 0.01


def test_moments_of_batches_are_those_of_all_pixels():
  x = np.random.default_rng(0).normal(3, 2, (3, 50, 4))
  batches = [{"a": {"norm": {"mean": part.mean(0), "var": part.var(0)}}} for part in x]
  found = unfold.total(batches)["a"]["norm"]
  np.testing.assert_allclose(found["mean"], x.mean((0, 1)))
  np.testing.assert_allclose(found["var"], x.var((0, 1)))


def test_a_network_without_batch_norm_is_refused(config, tmp_path):
  config = default_config(model="unet", data="synthetic")
  config.mesh.data, config.model.batch_norm, config.model.width = 1, False, 1
  experiment = Experiment(config)
  with pytest.raises(ConfigError, match="init.unfold = True: unet has no batch norm here"):
    experiment._unfold(dict(params={}, batch_stats={}))
