"""Networks in TFLite files: what is read of a graph, and the published ones against TFLite itself."""

import ast
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from segjax import config as config_lib
from segjax import models, pretrained
from segjax.config import ConfigError
from segjax.config import file as config_file
from segjax.evaluate import evaluate
from segjax.models.classifier import Classifier
from segjax.pretrained import files
from tests.test_readme import COMMANDS
from tests.tflite_file import write

pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")

MOBILENET = dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False)
HALF = dict(depth_multiplier=0.5, output_stride=8, **MOBILENET)
rng = np.random.default_rng(0)


def real(*shape):
  return (rng.standard_normal(shape).astype(np.float32),)


def test_float_layers_keep_their_values_and_are_called_by_weights_then_output_then_bias(tmp_path):
  """A bias may carry another layer's name, because converters share equal ones."""
  constants = {"A/weights/read": real(4, 3, 3, 2), "B/x_bias": real(4), "Const_3": real(4, 1, 1, 4)}
  constants |= {"pseudo": real(1, 3, 3, 4), "D/depthwise/depthwise_bias": real(4), "Const_4": real(7, 4)}
  path = write(tmp_path / "w.tflite", constants, [
    ("CONV_2D", ["in", "A/weights/read", "B/x_bias"], "a", 3),
    ("CONV_2D", ["a", "Const_3", "B/x_bias"], "C/BatchNorm/FusedBatchNormV3;C/Conv2D", 0),
    ("DEPTHWISE_CONV_2D", ["C/BatchNorm/FusedBatchNormV3;C/Conv2D", "pseudo", "D/depthwise/depthwise_bias"], "d", 1),
    ("FULLY_CONNECTED", ["d", "Const_4"], "E/MatMul", 0),
  ])  # fmt: skip
  found = files.load_arrays(path)
  (weights,), (narrow,), (depthwise,), (dense,) = (
    constants[n] for n in ("A/weights/read", "Const_3", "pseudo", "Const_4")
  )
  want = {"A/weights": weights.transpose(1, 2, 3, 0), "A/biases": constants["B/x_bias"][0]}
  want |= {"C/weights": narrow.transpose(1, 2, 3, 0), "C/biases": constants["B/x_bias"][0]}
  want |= {"D/depthwise/depthwise_weights": depthwise[0][..., None]}
  want |= {"D/depthwise/biases": constants["D/depthwise/depthwise_bias"][0]}
  want |= {"E/weights": dense.T[None, None], "E/biases": np.zeros(7, np.float32)}
  assert found.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(found[name], array, name)


def test_quantised_tensors_stand_for_scale_times_distance_from_zero(tmp_path):
  bytes_ = rng.integers(0, 256, (4, 1, 1, 3)).astype(np.uint8)
  per_channel, scales = rng.integers(-127, 128, (1, 3, 3, 4)).astype(np.int8), np.float32([0.5, 0.25, 2, 1])
  bias, half = rng.integers(-9999, 9999, 4).astype(np.int32), real(2, 1, 1, 4)[0].astype(np.float16)
  constants = {
    "A/weights_quant/FakeQuantWithMinMaxVars": (bytes_, [0.5], [128], 0),
    "A/Conv2D_Fold_bias": (bias, [0.125], [0], 0),
    "B/depthwise/weights_quant/FakeQuantWithMinMaxVars": (per_channel, scales, [0, 0, 0, 0], 3),
    "B/depthwise/depthwise_Fold_bias": (bias, scales, [0, 0, 0, 0], 0),
    "C/weights": (half,),
  }
  names = list(constants)
  found = files.load_arrays(write(tmp_path / "w.tflite", constants, [
    ("CONV_2D", ["in", *names[:2]], "A/Relu6", 3),
    ("DEPTHWISE_CONV_2D", ["A/Relu6", *names[2:4]], "B/depthwise/Relu6", 3),
    ("DEQUANTIZE", ["C/weights"], "C/weights_dequantize", 0),
    ("CONV_2D", ["B/depthwise/Relu6", "C/weights_dequantize"], "C/BiasAdd", 0),
  ]))  # fmt: skip
  np.testing.assert_array_equal(found["A/weights"], (bytes_.transpose(1, 2, 3, 0) - np.float32(128)) / 2)
  np.testing.assert_array_equal(found["A/biases"], bias / np.float32(8))
  np.testing.assert_array_equal(found["B/depthwise/depthwise_weights"][..., 0], per_channel[0] * scales)
  np.testing.assert_array_equal(found["B/depthwise/biases"], bias * scales)
  np.testing.assert_array_equal(found["C/weights"], np.float32(half).transpose(1, 2, 3, 0))
  assert len(found) == 6


@pytest.mark.parametrize("rectified, folded", [(0, True), (1, False)])
def test_a_multiplication_and_addition_behind_a_convolution_is_its_batch_norm_unless_an_activation_is_between(
  tmp_path, rectified, folded
):
  constants = {
    "A/weights": real(4, 1, 1, 3),
    "A/bias": real(4),
    "A/m": real(4),
    "A/a": real(4),
    "block": (np.int32([2]),),
  }
  path = write(tmp_path / "w.tflite", constants, [
    ("CONV_2D", ["in", "A/weights", "A/bias"], "A/Conv2D", rectified),
    ("BATCH_TO_SPACE_ND", ["A/Conv2D", "block", "block"], "x", 0),
    ("MUL", ["x", "A/m"], "y", 0),
    ("ADD", ["A/a", "y"], "A/Relu6", 3),
  ])  # fmt: skip
  found, (weights, bias, multiplier, added) = files.load_arrays(path), (v[0] for v in list(constants.values())[:4])
  if folded:
    assert found.keys() == {"A/weights", "A/biases"}
    np.testing.assert_allclose(found["A/weights"][0, 0], weights[:, 0, 0].T * multiplier, rtol=1e-6)
    np.testing.assert_allclose(found["A/biases"], bias * multiplier + added, rtol=1e-5)
  else:  # A scheme has no place for these.
    assert found.keys() == {"A/weights", "A/biases", "A/m", "A/a"}
    with pytest.raises(ValueError, match="names are none of official DeepLab's(.|\n)*A/m"):
      pretrained.SCHEMES["tf_deeplab"](found)


def test_what_cannot_be_read_says_why(tmp_path):
  (tmp_path / "w.tflite").write_bytes(b"no flatbuffer")
  with pytest.raises(ConfigError, match="cannot be read as .tflite .*does not begin as a TFLite file.*Fetch it again"):
    files.load_arrays(str(tmp_path / "w.tflite"))
  convolve = lambda weights, out: ("CONV_2D", ["in", weights], out, 0)  # noqa: E731
  for constants, operators, message in (
    ({}, [convolve("A/weights", "y")], "the weights of A are not constant"),
    ({"w": real(4, 1, 1, 3)}, [convolve("w", "y")], "no name tells the layer of w and y"),
    ({"v": real(4, 1, 1, 3), "w": real(4, 1, 1, 3)}, [convolve(n, f"A/{n}") for n in "vw"], "two layers are called A"),
  ):
    with pytest.raises(ConfigError, match=message):
      files.load_arrays(write(tmp_path / "w.tflite", constants, operators))


def with_weights(model, path):
  pretrained.assign(model, files.load_arrays(str(path)), "tf_deeplab")
  return jax.jit(lambda image: model(model.preprocess(image)))


def abstract(**options):
  return nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=21, rngs=nnx.Rngs(0), **options))


def pictures(shared, size):
  """Real images, [1, *size, 3] float32 each."""
  for path in sorted((shared / "data/voc_part/JPEGImages").glob("2008*.jpg")):
    yield np.float32(Image.open(path).convert("RGB").resize(size[::-1]))[None]


@pytest.mark.reference
def test_logits_of_the_published_network_of_half_width_are_tflites(shared):
  published = pytest.importorskip("benchmarks.published")
  path = shared / "weights/deeplabv3_257_mv_gpu.tflite"
  tflite, ours = published.TFLite(path), with_weights(abstract(**HALF), path)
  for image in itertools.islice(pictures(shared, (257, 257)), 5):
    np.testing.assert_allclose(ours(image), tflite(image), atol=1e-4, rtol=0)


@pytest.mark.reference
def test_batch_norm_that_was_not_folded_is_that_which_another_file_has_folded(shared):
  folded, other = (
    files.load_arrays(str(shared / f"weights/{name}.tflite"))
    for name in ("deeplabv3_257_mv_gpu", "deeplabv3_mnv2_dm05_pascal")
  )
  assert folded.keys() == other.keys()
  for name in folded:
    np.testing.assert_allclose(folded[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.reference
@pytest.mark.parametrize("name, share", [("deeplabv3_mnv2_dm05_pascal", 0.9999), ("deeplabv3_mnv2_pascal_quant", 0.97)])
def test_published_networks_predict_what_tflite_does(shared, name, share):
  """All of val: python benchmarks/published.py. TFLite's activations are quantised where the weights are."""
  published = pytest.importorskip("benchmarks.published")
  found = published.predictions(shared / f"weights/{name}.tflite", shared / "data/voc_part", "val")
  equal = [(theirs == ours).mean() for _, theirs, ours in itertools.islice(found, 4)]
  assert np.mean(equal) >= share


@pytest.mark.reference
def test_the_imagenet_network_is_a_classifier_and_a_backbone(shared):
  published = pytest.importorskip("benchmarks.published")
  path = shared / "weights/mobilenet_v2_1.0_224_quant.tflite"
  classifier = nnx.eval_shape(lambda: Classifier(num_classes=1001, backbone="mobilenet_v2", rngs=nnx.Rngs(0)))
  tflite, ours = published.TFLite(path), with_weights(classifier, path)
  chosen = [
    (tflite(image).argmax(), ours(image).argmax()) for image in itertools.islice(pictures(shared, (224, 224)), 12)
  ]
  assert sum(a == b for a, b in chosen) >= 8 and len({a for a, _ in chosen}) > 3
  arrays = files.load_arrays(str(path))
  model = abstract(backbone="mobilenet_v2")
  taken = pretrained.assign(model, arrays, "tf_deeplab", exclude=("aspp", "decoder", "logits"))
  assert taken == 5 * 51
  np.testing.assert_array_equal(
    model.backbone.layer_18.project.norm.bias[...], arrays["MobilenetV2/expanded_conv_16/project/biases"]
  )


@pytest.mark.reference
def test_the_readmes_command_scores_a_published_network(shared, tmp_path):
  (command,) = (c for c in COMMANDS if "--mode=eval" in c and ".tflite" in c)
  fields = dict(re.findall(r"--config\.([\w.]+)=([^\s\"]+)", command))
  config = config_file.load(re.search(r"--config=(\S+)", command)[1])
  for name, value in (fields | {"data.dir": str(tmp_path), "mesh.data": "1"}).items():
    text = isinstance(config_lib.fields(config)[name], str)
    config.update_from_flattened_dict({name: value if text else ast.literal_eval(value)})
  config.init.path = str(shared / "weights" / config.init.path)
  for folder in ("JPEGImages", "SegmentationClass"):
    (tmp_path / folder).symlink_to(shared / "data/voc_part" / folder)
  (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
  names = (shared / "data/voc_part/ImageSets/Segmentation/val.txt").read_text().split()[:3]
  (tmp_path / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
  assert evaluate(config, tmp_path / "run")["val/pixel_accuracy"] > 0.95
