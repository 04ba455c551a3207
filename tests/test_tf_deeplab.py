"""Official names to our paths, strictly both ways."""

import hashlib

import jax
import numpy as np
import pytest
from flax import nnx

from segjax import models, pretrained
from tests import seeded
from tests.marks import full

TABLES = {
  "xception41": dict(backbone="xception_41"),
  "xception65": {},
  "xception65_noSC": dict(separable=False),
  "xception71": dict(backbone="xception_71"),
  "mobilenetv2": dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False),
}


def abstract(**options):
  return nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=21, rngs=nnx.Rngs(0), **options))


def zeros(table):
  return {name: np.zeros(shape, np.float32) for name, (shape, _) in seeded.variables(table).items()}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("output_stride", [*full(8), 32])
def test_every_official_name_has_one_place_in_the_model(table, output_stride):
  arrays = zeros(table)
  slots = {f"{name}/Momentum": array for name, array in arrays.items()} | {"global_step": np.zeros(())}
  model = abstract(output_stride=output_stride, **TABLES[table])
  assert pretrained.assign(model, arrays | slots, "tf_deeplab") == len(arrays)


def test_seeded_values_are_those_of_the_reference():
  for table in ("mobilenetv2", "xception41"):
    for name, (shape, digest) in list(seeded.variables(table).items())[::7]:
      assert hashlib.sha256(seeded.value(name, shape).tobytes()).hexdigest()[:16] == digest, name


def test_wrong_names_missing_tensors_and_wrong_shapes_are_all_listed():
  arrays = zeros("mobilenetv2")
  model = abstract(**TABLES["mobilenetv2"])
  with pytest.raises(ValueError, match="1 names are none of official DeepLab's(.|\n)*MobilenetV2/Convolution/weights"):
    pretrained.assign(model, arrays | {"MobilenetV2/Convolution/weights": np.zeros(1)}, "tf_deeplab")
  del arrays["aspp0/BatchNorm/gamma"]
  arrays["decoder/feature_projection0/BatchNorm/beta"] = np.zeros(48)
  arrays["logits/semantic/biases"] = np.zeros(19)
  with pytest.raises(ValueError) as error:
    pretrained.assign(model, arrays, "tf_deeplab")
  for line in (
    "only in the model: params/aspp/branch0/norm/scale",
    "only in the tf_deeplab weights: params/decoder/low_level/norm/bias",
    "params/logits/bias: the model has (21,), the tf_deeplab weights has (19,)",
    "3 problems",
  ):
    assert line in str(error.value)
  with pytest.raises(ValueError, match="init.scheme = 'tf': choose one of tf_deeplab"):
    pretrained.assign(model, arrays, "tf")


@pytest.mark.slow
def test_a_new_number_of_classes_keeps_its_own_head():
  options = dict(name="deeplab_v3plus", num_classes=5, backbone="mobilenet_v2", atrous_rates=(), decoder=False)

  def build():
    return models.build(rngs=nnx.Rngs(0), **options)

  # As state.py does it: eager initialisation is slow.
  model = nnx.merge(nnx.graphdef(nnx.eval_shape(build)), jax.jit(lambda: nnx.state(build()))())
  before = model.logits.kernel[...]
  arrays = zeros("mobilenetv2")
  with pytest.raises(ValueError, match="params/logits/kernel: the model has"):
    pretrained.assign(model, arrays, "tf_deeplab")
  assert pretrained.assign(model, arrays, "tf_deeplab", exclude=("logits",)) == len(arrays) - 2
  assert (model.logits.kernel[...] == before).all()
  assert (model.aspp.branch0.conv.kernel[...] == 0).all()


def test_depthwise_kernels_keep_their_taps():
  arrays = zeros("mobilenetv2")
  name = "MobilenetV2/expanded_conv/depthwise/depthwise_weights"
  arrays[name] = seeded.value(name, arrays[name].shape)
  model = abstract(**TABLES["mobilenetv2"])
  pretrained.assign(model, arrays, "tf_deeplab")
  np.testing.assert_array_equal(model.backbone.layer_2.depthwise.depthwise_kernel[...][:, :, 0], arrays[name][..., 0])
