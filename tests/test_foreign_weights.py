"""Runs that begin with, or score, the weights of other frameworks' files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import evaluate, inference, input_pipeline, metrics, models, pretrained
from segjax.config import ConfigError, default_config
from segjax.experiment import Experiment
from segjax.run import warm_start
from tests import seeded

MOBILENET = dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False)


@pytest.fixture
def config(tmp_path):
  """DeepLab with MobileNetV2 and official weights of 6 classes, in an .npz file, on generated images."""
  config = default_config(model="deeplab_v3plus", data="synthetic")
  config.model.update(MOBILENET, output_stride=32)
  config.mesh.data = 1
  config.crop_size = (33, 33)
  config.data.image_size, config.data.num_val, config.data.workers = (33, 49), 3, 1
  config.eval.batch_size, config.eval.num_overlays = 3, 1
  arrays = seeded.arrays("mobilenetv2")
  for name, shape in {"logits/semantic/weights": (1, 1, 256, 6), "logits/semantic/biases": (6,)}.items():
    arrays[name] = seeded.value(name, shape)
  np.savez(tmp_path / "official.npz", **arrays)
  config.init.path, config.init.scheme = str(tmp_path / "official.npz"), "tf_deeplab"
  return config


def test_official_weights_are_scored_without_a_run_at_another_stride(config, tmp_path, capsys):
  config.model.output_stride = 16
  scores = evaluate.evaluate(config, tmp_path / "official")
  output = capsys.readouterr().out
  assert f"val: 3 images, init: imported 272 of 272 tensors from {config.init.path}, scales (1.0,)" in output
  assert (tmp_path / "official/eval_val/metrics.jsonl").is_file()

  model = nnx.eval_shape(
    lambda: models.build("deeplab_v3plus", num_classes=6, output_stride=16, **MOBILENET, rngs=nnx.Rngs(0))
  )
  pretrained.assign(model, dict(np.load(config.init.path)), "tf_deeplab")
  source = input_pipeline.make_source(config.data, "val")
  image, label = (jnp.stack(part) for part in zip(*(source[n] for n in range(3))))
  predict = nnx.jit(lambda model, image: inference.class_scores(model, model.preprocess(image)).argmax(-1))
  prediction = predict(model, image)
  want = metrics.scores(np.asarray(metrics.confusion_matrix(label, prediction, 6)))
  np.testing.assert_allclose(scores["val/pixel_accuracy"], want["pixel_accuracy"], atol=1e-3)  # Near ties.


def test_a_new_head_is_named_before_anything_else_of_the_file_is_taken(config):
  init = Experiment(config, num_classes=9).init
  abstract = jax.eval_shape(init).variables()
  loaded = warm_start.load(config.init)
  with pytest.raises(ConfigError, match=r"params/logits/bias: the model has \(9,\), .*official.npz has \(6,\)"):
    warm_start.merge(abstract, loaded, ())
  merged, line = warm_start.merge(abstract, loaded, ("logits",))
  assert line == f"init: imported 270 of 272 tensors from {config.init.path}"
  assert isinstance(merged["params"]["logits"]["bias"], jax.ShapeDtypeStruct)
  assert merged["params"]["backbone"]["layer_1"]["conv"]["kernel"].dtype == np.float32


def test_a_file_needs_a_scheme_and_a_workdir_needs_none(config, tmp_path):
  config.init.scheme = ""
  with pytest.raises(ConfigError, match="init.scheme = '': say whose names .*tf_deeplab"):
    warm_start.load(config.init)
  config.init.path, config.init.scheme = str(tmp_path), "tf_deeplab"
  with pytest.raises(ConfigError, match="is a folder, so it must be the workdir of a run.*Leave the scheme empty"):
    warm_start.load(config.init)
  config.init.scheme = ""
  with pytest.raises(ConfigError, match="is not the workdir of a run"):
    warm_start.load(config.init)


def test_a_crop_smaller_than_the_networks_stride_is_refused(config):
  config.crop_size = (16, 33)
  with pytest.raises(ConfigError, match=r"crop_size = \(16, 33\): smaller than the network's stride of 32"):
    jax.eval_shape(Experiment(config).init)
