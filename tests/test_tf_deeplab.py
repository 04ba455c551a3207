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


@pytest.mark.parametrize(
  "table, output_stride",
  [
    *((table, 32) for table in ("xception41", "mobilenetv2")),
    *full(*((table, 32) for table in TABLES if table.startswith(("xception65", "xception71")))),
    *full(*((table, 8) for table in TABLES)),
  ],
)
def test_every_official_name_has_one_place_in_the_model(table, output_stride):
  arrays = zeros(table)
  slots = {f"{name}/Momentum": array for name, array in arrays.items()} | {"global_step": np.zeros(())}
  model = abstract(output_stride=output_stride, **TABLES[table])
  assert pretrained.assign(model, arrays | slots, "tf_deeplab") == len(arrays)


@pytest.mark.parametrize("separable, table", [(True, "xception65"), (False, "xception65_noSC")])
def test_mobilenet_takes_the_official_decoder_on_the_expanded_features_of_layer_4(separable, table):
  decoder = {name: array for name, array in zeros(table).items() if name.startswith("decoder/")}
  decoder["decoder/feature_projection0/weights"] = np.zeros((1, 1, 144, 48), np.float32)
  arrays = zeros("mobilenetv2") | decoder
  model = abstract(backbone="mobilenet_v2", atrous_rates=(), separable=separable)
  assert pretrained.assign(model, arrays, "tf_deeplab") == len(arrays)
  assert model.backbone.low_level == "layer_4/depthwise"


def folded(arrays):
  """The same network whose batch norms are folded into its convolutions, as TFLite's converter does it."""
  result = {name: array for name, array in arrays.items() if "/BatchNorm/" not in name}
  for scope in {name.partition("/BatchNorm/")[0] for name in arrays if "/BatchNorm/" in name}:
    gamma, beta, mean, var = (
      np.float64(arrays[f"{scope}/BatchNorm/{leaf}"]) for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    gain = gamma / np.sqrt(var + (1e-3 if scope.startswith("MobilenetV2/") else 1e-5))
    kernel = f"{scope}/{'depthwise_weights' if scope.endswith('depthwise') else 'weights'}"
    result[kernel] = np.float32(arrays[kernel] * (gain[:, None] if scope.endswith("depthwise") else gain))
    result[f"{scope}/biases"] = np.float32(beta - mean * gain)
  return result


def test_folded_batch_norm_becomes_one_of_mean_0_and_variance_1_that_computes_the_same():
  logits, image = [], seeded.image(33, 33)
  for arrays in (seeded.arrays("mobilenetv2"), folded(seeded.arrays("mobilenetv2"))):
    model = abstract(output_stride=32, **TABLES["mobilenetv2"])
    assert pretrained.assign(model, arrays, "tf_deeplab") == 272
    logits.append(jax.jit(lambda x, model=model: model(model.preprocess(x)))(image))
  np.testing.assert_allclose(*logits, atol=1e-4)
  norm = model.backbone.layer_2.depthwise_norm
  assert (norm.mean[...] == 0).all() and (norm.var[...] == 1).all()


def test_a_bias_is_no_batch_norm_where_the_scheme_has_neither_or_where_some_of_it_is_there():
  arrays = folded(zeros("mobilenetv2"))
  model = abstract(**TABLES["mobilenetv2"])
  with pytest.raises(ValueError, match="1 names are none of official DeepLab's(.|\n)*  nowhere/biases"):
    pretrained.assign(model, arrays | {"nowhere/biases": np.zeros(3)}, "tf_deeplab")
  del arrays["aspp0/biases"]
  with pytest.raises(ValueError, match="4 problems(.|\n)*only in the model: params/aspp/branch0/norm/scale"):
    pretrained.assign(model, arrays, "tf_deeplab")


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
