"""`init.unfold`: running statistics for weights whose batch norm was folded away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import state, steps
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.models import layers
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


@pytest.mark.full
def test_unfolding_changes_no_logit_and_batch_statistics_then_give_them_too(config):
  """With all images in one batch, its statistics are theirs, layer by layer."""
  experiment = Experiment(config, num_classes=21)
  folded_state, _ = experiment.first_state()
  config.init.unfold = True
  new, line = experiment.first_state()
  assert line.endswith("; batch norm by the statistics of 4 training images (init.unfold)")
  images = jnp.float32([experiment.train_source[n][0] for n in range(4)])

  @jax.jit
  def logits(variables):
    model = steps.merge(experiment.graphdef, variables)
    return tuple(model(model.preprocess(images), train=train) for train in (False, True))

  before, by_batch_before = logits(folded_state.variables())
  after, by_batch = logits(new.variables())
  largest = np.abs(before).max()
  np.testing.assert_allclose(after, before, atol=1e-4 * largest, rtol=0)
  np.testing.assert_allclose(by_batch, before, atol=1e-3 * largest, rtol=0)
  assert np.abs(by_batch_before - before).max() > 0.1 * largest
  assert np.ptp(np.asarray(new.batch_stats["backbone"]["layer_1"]["norm"]["var"])) > 0.01


def test_other_statistics_with_their_scale_and_bias_give_the_same_results():
  class Pair(nnx.Module):
    def __init__(self, rngs):
      self.first, self.second = (
        layers.ConvNorm(3, 3, norm=dict(epsilon=epsilon), activation=layers.linear, rngs=rngs)
        for epsilon in (1e-3, 1e-5)
      )

    def __call__(self, x, train=False):
      return self.second(self.first(x, train), train)

  pair, x = Pair(nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (2, 5, 7, 3)) + 4
  pair.second.norm.scale[...], pair.first.norm.mean[...] = jnp.array([1.0, -2, 0.5]), jnp.array([0.1, 0, -3])
  before = pair(x)
  _, params, batch_stats = state.split(pair)
  variables = jax.device_get(dict(params=params, batch_stats=batch_stats))
  pair.set_attributes(measures=True)
  np.testing.assert_array_equal(pair(x), before)
  measured = unfold.total([state.split(pair)[2]])
  pair.set_attributes(measures=False)
  given = np.asarray(pair.first.conv(x))
  np.testing.assert_allclose(measured["first"]["norm"]["mean"], given.mean((0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(measured["first"]["norm"]["var"], given.var((0, 1, 2)), rtol=1e-4)
  new = unfold.unfold(pair, variables, measured)
  pair = steps.merge(nnx.graphdef(pair), new)
  np.testing.assert_allclose(pair(x), before, atol=1e-5)
  np.testing.assert_allclose(pair(x, True), before, atol=1e-4)


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
    experiment._unfold(dict(params={}, batch_stats={}), None)


@pytest.mark.reference
def test_the_published_network_unfolded_on_real_images_has_the_logits_it_had(shared, tmp_path):
  config = default_config(model="deeplab_v3plus", data="voc")
  config.data.dir, config.data.train_split, config.data.canvas_size = str(tmp_path), "train", (513, 513)
  config.model.update(backbone="mobilenet_v2", depth_multiplier=0.5, atrous_rates=(), decoder=False)
  config.mesh.data, config.batch_size, config.crop_size = 1, 4, (257, 257)
  config.init.path, config.init.scheme = str(shared / "weights/deeplabv3_257_mv_gpu.tflite"), "tf_deeplab"
  for folder in ("JPEGImages", "SegmentationClass"):
    (tmp_path / folder).symlink_to(shared / "data/voc_part" / folder)
  (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
  names = (shared / "data/voc_part/ImageSets/Segmentation/train.txt").read_text().split()[:8]
  (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n".join(names))
  experiment = Experiment(config)
  image = jnp.float32(experiment.train_source[0][0][:257, :257])[None]

  @jax.jit
  def logits(variables):
    model = steps.merge(experiment.graphdef, variables)
    return model(model.preprocess(image))

  before = logits(experiment.first_state()[0].variables())
  config.init.unfold = True
  np.testing.assert_allclose(logits(experiment.first_state()[0].variables()), before, atol=1e-4, rtol=0)
