"""PyTorch's networks against ours: every name has its place, and the numbers are theirs (../shared/reference/torch)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import models, pretrained
from segjax.models import resize
from tests import seeded
from tests.marks import full

# Fixture, which is also its list of names: network and the options in which it differs.
CASES = {
  "vainf_deeplabv3plus_resnet50": ("vainf/deeplabv3plus_resnet50", {}),
  "vainf_deeplabv3plus_resnet50_separable": ("vainf/deeplabv3plus_resnet50", dict(separable=True)),
  "vainf_deeplabv3plus_resnet101": ("vainf/deeplabv3plus_resnet101", {}),
  "vainf_deeplabv3plus_mobilenet": ("vainf/deeplabv3plus_mobilenet", {}),
  "timm_xception41_os32": ("timm/xception41", {}),
  "timm_xception41_os16": ("timm/xception41", dict(output_stride=16)),
  "timm_xception41_os8": ("timm/xception41", dict(output_stride=8)),
  "timm_xception65_os32": ("timm/xception65", {}),
  "timm_xception65_os16": ("timm/xception65", dict(output_stride=16)),
  "timm_xception65_os8": ("timm/xception65", dict(output_stride=8)),
  "timm_xception65_features_only_os16": ("timm/xception65", dict(output_stride=16)),
  "timm_xception71_os16": ("timm/xception71", dict(output_stride=16)),
  "smp_deeplabv3plus_resnet50": ("smp/deeplabv3plus_resnet50", {}),
  "smp_deeplabv3plus_resnet50_rates6_full": (
    "smp/deeplabv3plus_resnet50",
    dict(atrous_rates=(6, 12, 18), details=dict(separable_aspp=False)),
  ),
  "smp_deeplabv3plus_mobilenet_v2": ("smp/deeplabv3plus_mobilenet_v2", {}),
  "smp_deeplabv3plus_tu-xception65": ("smp/deeplabv3plus_tu-xception65", {}),
  "smp_deeplabv3plus_tu-xception41_os8": ("smp/deeplabv3plus_tu-xception41", dict(output_stride=8)),
  "smp_unet_resnet18": ("smp/unet_resnet18", {}),
  "smp_unet_vgg16_bn": ("smp/unet_vgg16_bn", {}),
  "milesial_unet_transposed": ("milesial/unet_transposed", {}),
  "milesial_unet_bilinear": ("milesial/unet_bilinear", {}),
  "torchvision_deeplabv3_resnet50": ("torchvision/deeplabv3_resnet50", {}),
  "torchvision_fcn_resnet50": ("torchvision/fcn_resnet50", {}),
  "torchvision_vgg16": ("torchvision/vgg16", {}),
}

# The fixtures' names of intermediate results, and ours.
ENDPOINTS = (
  (r"stem", "conv1_2"),
  (r"pool(\d)|fc(\d)", r"\g<0>"),
  (r"backbone_layer(\d)", r"block\1"),
  (r"logits_(os4|low)", "logits"),
)


def end_point(name, model, endpoints):
  """Our end point of a fixture's name."""
  backbone, stages = model.backbone, {}
  if hasattr(model, "down0"):  # A milesial U-Net, which counts from the coarsest level up.
    return "down0" if name == "inc" else f"up{4 - int(name[2:])}" if name.startswith("up") else name
  if hasattr(backbone, "units") and isinstance(backbone.units[0][0], str):  # An Xception.
    blocks = [f"{block}/unit{n}" for block, n in backbone.units]
    strided = [b for b in blocks if hasattr(getattr(backbone, b.split("/")[0]).unit1, "shortcut")]
    strided = [b for b in strided if f"{b}/sep2/relu" in endpoints]
    entry = [f"{block}/sep2/relu" for block in strided]
    taps = entry if len(entry) == 4 else [entry[n] for n in (0, 2, 4, 5)]  # Xception-71's second and fourth keep size.
    stages = {f"tap{n}": tap for n, tap in enumerate([*taps, blocks[-1]])}
    stages |= {f"enc{n + 1}": tap for n, tap in enumerate([*taps, blocks[-1]])}
    stages |= {f"block{n}": block for n, block in enumerate(blocks)}
  elif hasattr(backbone, "units"):  # A ResNet.
    stages = {"enc1": "conv1"} | {f"enc{n + 1}": f"block{n}" for n in range(1, 5)}
    stages |= dict(low_level="block1", out="block4")
  elif hasattr(backbone, "conv5_3"):  # A VGG, in smp's numbers.
    stages = {f"enc{n}": f"stage{n + 1}" for n in range(5)} | dict(enc5="pool5")
  elif hasattr(backbone, "layer_18"):
    last = "layer_19" if "layer_19" in endpoints else "layer_18"
    stages = dict(enc1="layer_2", enc2="layer_4", enc3="layer_7", enc4="layer_14", enc5=last)
    stages |= dict(low_level="layer_4", out=last)
  stages |= dict(aspp="aspp/projection", decoder="decoder/block5" if "decoder/block5" in endpoints else "decoder/conv1")
  if name in stages:
    return stages[name]
  for pattern, ours in ENDPOINTS:
    if re.fullmatch(pattern, name):
      return re.sub(pattern, ours, name)
  return name


def shapes(case):
  """{key: shape} of a network's `state_dict`, running counts left out; the output stride changes none."""
  with np.load(seeded.DATA / "torch_state_dicts.npz") as tables:
    table = tables[re.sub(r"^(timm_xception\d+)_os\d+$", r"\1", case)].item().decode()
  rows = (row.split("\t") for row in table.splitlines())
  return {key: tuple(int(n) for n in shape.split("x")) for key, shape in rows}


def abstract(case, **more):
  network, options = CASES[case]
  num_classes = 1000 if "timm" in network or network == "torchvision/vgg16" else 21
  return nnx.eval_shape(
    lambda: pretrained.build(network, num_classes=num_classes, rngs=nnx.Rngs(0), **(options | more))
  )


def assign(case, model, arrays):
  exclude = ("logits",) if "features_only" in case else ()  # Those have no classifier.
  return pretrained.assign(model, arrays, CASES[case][0].partition("/")[0], exclude)


def seeded_model(case, gain, **more):
  model, arrays = abstract(case, **more), seeded.torch_weights(shapes(case), gain)
  assign(case, model, arrays)
  if "features_only" in case:
    model.logits.kernel[...], model.logits.bias[...] = jnp.zeros((1, 1, 2048, 1000)), jnp.zeros(1000)
  return model


def forward(model, image):
  """Output and end points, at full float32 precision."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, image):
    endpoints = {}
    return nnx.merge(graphdef, state)(image, endpoints=endpoints), endpoints

  with jax.default_matmul_precision("highest"):
    return run(state, image)


def check(case, z, tolerance=20):
  """Everything that a fixture holds, within `tolerance` times PyTorch's own float32 noise; returns the largest ratio."""
  model, worst = seeded_model(case, float(z["gain"])), 0
  weights = [shape for key, shape in shapes(case).items() if key.endswith(("weight", "bias"))]
  assert sum(int(np.prod(shape)) for shape in weights) == int(z["params"])
  for size in sorted({key.partition("/")[0] for key in z.files if "/" in key}):
    h, w = (int(n) for n in size.split("x"))
    if case.startswith("milesial") and (h % 16 or w % 16):
      continue  # It drops odd pixels when pooling and pads what comes from below; we pad the image.
    image = np.random.default_rng(0).standard_normal([1, 3, h, w]).astype(np.float32).transpose(0, 2, 3, 1)
    output, endpoints = forward(model, jnp.asarray(image))
    final = "out" if case.startswith("torchvision") else "logits"
    names = [key.removeprefix(f"{size}/").removesuffix("__shape") for key in z.files if key.endswith("__shape")]
    for name in (name for name in names if "/" not in name):  # Those of this size.
      if name == final:
        got = output
      elif name == "aux":
        got = resize.resize_bilinear(endpoints["auxiliary"], (h, w), align_corners=False)
      else:
        got = endpoints[end_point(name, model, endpoints)]
      got, key = np.asarray(got), f"{size}/{name}"
      got = got.transpose(0, 3, 1, 2) if got.ndim == 4 else got
      assert got.shape == tuple(z[f"{key}__shape"]), name
      difference = np.abs(got.ravel()[z[f"{key}__probe_index"]] - z[f"{key}__probe"]).max()
      difference = max(difference, np.abs(got - z[key]).max()) if key in z else difference
      ratio = float(difference / z[f"{key}__f32_noise"])
      assert ratio < tolerance, f"{key}: {difference} is {ratio} times the noise"
      worst = max(worst, ratio)
  return worst


# One of each table of names; the others are the same at another stride or depth.
DEEPER = ("timm_xception65_features_only_os16", "timm_xception71_os16", "smp_deeplabv3plus_resnet50_rates6_full")
DISTINCT = (
  "vainf_deeplabv3plus_resnet50_separable",
  "vainf_deeplabv3plus_mobilenet",
  "timm_xception41_os8",
  "smp_deeplabv3plus_mobilenet_v2",
  "smp_deeplabv3plus_tu-xception41_os8",
  "smp_unet_resnet18",
  "smp_unet_vgg16_bn",
  "milesial_unet_transposed",
  "milesial_unet_bilinear",
  "torchvision_deeplabv3_resnet50",
  "torchvision_fcn_resnet50",
  "torchvision_vgg16",
)


@pytest.mark.parametrize(
  "case",
  [
    *DISTINCT,
    *full(*DEEPER),
    *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in DISTINCT + DEEPER),
  ],
)
def test_every_name_has_one_place_in_the_model(case):
  arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes(case).items()}
  counts = {f"{key.rpartition('.')[0]}.num_batches_tracked": np.zeros((), np.int64) for key in arrays if "mean" in key}
  model = abstract(case)
  assert assign(case, model, arrays | counts) == len(arrays)
  learnt = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert learnt == sum(a.size for key, a in arrays.items() if "running" not in key) + (2049000 if "only" in case else 0)


# Rates of the last two stages' 3x3 convolutions: mmsegmentation's dilations, of which a stage's first unit has half of what
# the others have in a ResNet (contract_dilation); mg124 is 1, 2, 4 itself.
@pytest.mark.parametrize(
  "case, network, rates",
  [
    ("deeplabv3plus_r50-d8_cityscapes", "deeplabv3plus_r50-d8", [1] + [2] * 5 + [2, 4, 4]),
    ("deeplabv3plus_r50-d8_cityscapes", "deeplabv3plus_r50-d8_769", [1] + [2] * 5 + [2, 4, 4]),
    ("deeplabv3plus_r101-d16-mg124_cityscapes", "deeplabv3plus_r101-d16-mg124", [1] * 23 + [1, 2, 4]),
    ("deeplabv3plus_mobilenet-v2-d8_cityscapes", "deeplabv3plus_mobilenet-v2-d8", [2] * 7 + [4] * 4),
    ("fcn_r50-d8_voc12aug", "fcn_r50-d8", [1] + [2] * 5 + [2, 4, 4]),
    ("unet-s5-d16_fcn_cityscapes", "unet-s5-d16_fcn", []),
  ],
)
def test_mmsegmentations_names_have_one_place_and_its_dilations_are_ours(case, network, rates):
  keys = shapes(f"mmseg_{case}")
  num_classes = keys["decode_head.conv_seg.bias"][0]
  model = nnx.eval_shape(lambda: pretrained.build(f"mmseg/{network}", num_classes=num_classes, rngs=nnx.Rngs(0)))
  arrays = {key: np.zeros(shape, np.float32) for key, shape in keys.items()}
  assert pretrained.assign(model, arrays, "mmseg") == len(keys)
  learnt = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  assert learnt == sum(array.size for key, array in arrays.items() if "running" not in key)
  if "mobilenet" in case:
    found = [getattr(model.backbone, f"layer_{n}").depthwise.rate for n in range(8, 19)]
  elif "unet" in case:
    found = []
  else:
    units = [getattr(getattr(model.backbone, f"block{b}"), f"unit{n}") for b, n in model.backbone.units if b > 2]
    found = [unit.conv2.conv.rate for unit in units]
  assert found == rates


@pytest.mark.parametrize(
  "case", ["vainf_deeplabv3plus_mobilenet", "torchvision_fcn_resnet50", *full("smp_deeplabv3plus_resnet50")]
)
def test_logits_and_end_points_equal_the_peers(case):
  check(case, np.load(seeded.DATA / f"torch_{case}.npz"))


WHOLE = "milesial_unet_transposed"  # tests/test_unet.py has a narrow one.


@pytest.mark.parametrize(
  "case",
  [
    *full(WHOLE),
    *(pytest.param(case, marks=pytest.mark.reference) for case in CASES if case not in ("torchvision_vgg16", WHOLE)),
  ],
)
def test_all_logits_and_end_points_equal_the_peers(case, shared):
  path = shared / "reference/torch/fixtures" / f"{case}.npz"
  if not path.is_file():
    pytest.skip(f"{path.name} is not among the reference numbers")
  print(f"{case}: {check(case, np.load(path)):.2f} times PyTorch's float32 noise")


@pytest.mark.reference
def test_vgg16_equals_torchvisions(shared):
  """The classifier at 224x224, and the same weights sliding over a padded smaller image."""
  case, z = "torchvision_vgg16", np.load(shared / "reference/torch/fixtures/torchvision_vgg16.npz")
  model = seeded_model(case, float(z["gain"]))

  def close(got, key):
    got = np.asarray(got).transpose(0, 3, 1, 2) if got.ndim == 4 else np.asarray(got)
    ratio = np.abs(got.ravel()[z[f"{key}__probe_index"]] - z[f"{key}__probe"]).max() / z[f"{key}__f32_noise"]
    assert got.shape == tuple(z[f"{key}__shape"]) and ratio < 20, (key, ratio)
    print(f"{case} {key}: {ratio:.2f} times PyTorch's float32 noise")

  def image(h, w):
    noise = np.random.default_rng(0).standard_normal([1, 3, h, w]).astype(np.float32)
    return jnp.asarray(noise.transpose(0, 2, 3, 1))

  close(forward(model, image(224, 224))[0], "224x224/logits")
  model.backbone.fc6.padding = "same"
  _, endpoints = forward(model, image(64, 96))
  for name in ("pool1", "pool2", "pool3", "pool4", "pool5", "fc6", "fc7"):
    close(endpoints[name], f"64x96/{name}")
  close(model.logits(endpoints["fc7"]), "64x96/conv_logits")


def test_weights_of_a_classifier_fit_the_backbone_of_a_segmentation_network():
  keys = shapes("timm_xception41_os32")
  arrays = {key: np.zeros(shape, np.float32) for key, shape in keys.items()}
  key = "blocks.12.stack.conv3.conv_pw.weight"
  arrays |= seeded.torch_weights({key: keys[key]}, 1.0)
  model = nnx.eval_shape(
    lambda: models.build("deeplab_v3plus", num_classes=5, backbone="xception_41", rngs=nnx.Rngs(0))
  )
  taken = pretrained.assign(model, arrays, "timm", exclude=("logits", "aspp", "decoder"))
  assert taken == len(arrays) - 2
  kernel = model.backbone.exit_block2.unit1.sep3.pointwise.kernel[...]
  np.testing.assert_array_equal(kernel[0, 0], arrays[key][:, :, 0, 0].T)


def test_mistakes_are_listed():
  case = "torchvision_fcn_resnet50"
  arrays = {key: np.zeros(shape, np.float32) for key, shape in shapes(case).items()}
  with pytest.raises(ValueError, match="1 names are none of torchvision's(.|\n)*backbone.layer5.0.conv4.weight"):
    assign(case, abstract(case), arrays | {"backbone.layer5.0.conv4.weight": np.zeros((1, 1, 1, 1))})
  with pytest.raises(ValueError, match="backbone.bn1.momentum"):
    assign(case, abstract(case), arrays | {"backbone.bn1.momentum": np.zeros(1)})
  del arrays["backbone.bn1.weight"]
  arrays["classifier.4.bias"] = np.zeros(19)
  with pytest.raises(ValueError) as error:
    assign(case, abstract(case), arrays)
  assert "only in the model: params/backbone/conv1/norm/scale" in str(error.value)
  assert "params/logits/bias: the model has (21,), the torchvision weights has (19,)" in str(error.value)
  with pytest.raises(ValueError, match="No network is called 'timm/xception66': choose one of vainf/"):
    pretrained.build("timm/xception66", num_classes=3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="model.details has no align_corner: choose from align_corners"):
    pretrained.build("vainf/deeplabv3plus_resnet50", num_classes=3, rngs=nnx.Rngs(0), details=dict(align_corner=True))


@pytest.mark.parametrize(
  "network, symmetric",
  [
    ("timm/xception41", True),
    ("smp/deeplabv3plus_tu-xception41", True),
    ("smp/deeplabv3plus_mobilenet_v2", False),
    ("vainf/deeplabv3plus_mobilenet", False),
    ("torchvision/resnet50", False),
    ("torchvision/vgg16", False),
  ],
)
def test_preprocessing_is_the_peers(network, symmetric):
  """ImageNet's mean and deviation, but 0.5 and 0.5 for what timm trained."""
  mean, std = ((0.5,) * 3, (0.5,) * 3) if symmetric else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  model = nnx.eval_shape(lambda: pretrained.build(network, num_classes=2, rngs=nnx.Rngs(0)))
  raw = np.stack([np.zeros((1, 1, 3)), np.full((1, 1, 3), 255.0)])
  np.testing.assert_allclose(model.preprocess(raw), (raw / 255 - mean) / std, atol=1e-5)
  np.testing.assert_allclose(model.preprocess(np.reshape(model.mean, (1, 1, 1, 3))), 0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vainf_deeplabv3plus_resnet50", "torchvision_fcn_resnet50"])
def test_bfloat16_logits_stay_within_two_percent(case):
  image = jnp.asarray(np.random.default_rng(0).standard_normal([1, 64, 96, 3]), jnp.float32)
  wide, narrow = (forward(seeded_model(case, 0.7, dtype=dtype), image)[0] for dtype in ("float32", "bfloat16"))
  assert narrow.dtype == jnp.float32
  assert float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)) < 2e-2
