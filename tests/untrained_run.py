"""A data set of images of several sizes, and the workdir of a run on it, of random weights: nothing is trained."""

import jax
import numpy as np
from PIL import Image

from segjax import config as config_lib
from segjax import input_pipeline, sharding, state
from segjax.config import default_config
from segjax.experiment import Experiment
from segjax.models import resize
from segjax.run import prediction_info
from segjax.run.checkpoint import Checkpoints

SIZES = ((40, 56), (48, 64), (33, 31), (48, 50), (20, 64))


def smooth(seed, size):
  """Blotches, so that a network of random weights finds more than one class."""
  coarse = np.random.default_rng(seed).uniform(0, 255, (1, 6, 7, 3)).astype(np.float32)
  return np.asarray(resize.resize_bilinear(coarse, size))[0].astype(np.uint8)


def make_data(root):
  """The folder of a data set whose images differ in size."""
  for n, size in enumerate(SIZES):
    for folder, pixels in (("images", smooth(n, size)), ("masks", np.zeros(size, np.uint8))):
      (root / folder / "val").mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(root / folder / "val" / f"{n}.png")
  return root


def make_config(data, model="unet", classes=3, **options):
  config = default_config(model=model, data="folder")
  config.data.update(dir=str(data), classes=tuple("abcde"[:classes]), loader="grain", workers=2)
  config.mesh.data, config.eval.batch_size, config.crop_size = 1, 2, (32, 32)
  config.model.update(options or dict(width=4, depth=2))
  return config


def make_run(config, workdir):
  """A workdir as training leaves it, of random weights and statistics."""
  source = input_pipeline.make_source(config.data, "val")
  init = Experiment(config, num_classes=len(source.classes)).init
  weights = state.materialize(init, sharding.replicated(sharding.make_mesh(1)))
  rng = np.random.default_rng(0)

  def draw(x):
    noise = rng.standard_normal(x.shape).astype(x.dtype)
    if config.model.name == "deeplab_v3plus":  # Fades to nothing over its depth without a gain.
      return 1.6 * x + (0.05 * noise if x.ndim == 1 else 0)
    return x + (0.3 * np.abs(np.asarray(x)).mean() + 0.05) * noise

  weights.params = jax.tree.map(draw, weights.params)
  if config.model.name == "deeplab_v3plus":
    weights.params["logits"]["bias"] += np.array([0, -6], np.float32)  # Both classes occur.
  workdir.mkdir()
  config_lib.save(config, workdir)
  prediction_info.of_split(source, config.data).save(workdir)
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save(weights, 0.5)
  return workdir
