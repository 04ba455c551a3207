"""PyTorch's networks against ours: every name has its place, and the numbers are theirs (../shared/reference/torch)."""

import re

import jax
import numpy as np
import pytest
from flax import nnx

from segjax import pretrained
from segjax.models import resize
from tests import seeded

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
    "smp/deeplabv3plus_resnet50", dict(atrous_rates=(6, 12, 18), details=dict(separable_aspp=False))
  ),
  "smp_deeplabv3plus_mobilenet_v2": ("smp/deeplabv3plus_mobilenet_v2", {}),
  "smp_deeplabv3plus_tu-xception65": ("smp/deeplabv3plus_tu-xception65", {}),
  "smp_deeplabv3plus_tu-xception41_os8": ("smp/deeplabv3plus_tu-xception41", dict(output_stride=8)),
  "torchvision_deeplabv3_resnet50": ("torchvision/deeplabv3_resnet50", {}),
  "torchvision_fcn_resnet50": ("torchvision/fcn_resnet50", {}),
  "torchvision_vgg16": ("torchvision/vgg16", {}),
}  # fmt: skip

# The fixtures' names of intermediate results, and ours.
ENDPOINTS = (
  (r"stem", "conv1_2"),
  (r"pool(\d)|fc(\d)", r"\g<0>"),
  (r"backbone_layer(\d)", r"block\1"),
  (r"logits_os4", "logits"),
)


def end_point(name, model, endpoints):
  """Our end point of a fixture's name."""
  backbone, stages = model.backbone, {}
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
  elif hasattr(backbone, "layer_18"):
    last = "layer_19" if "layer_19" in endpoints else "layer_18"
    stages = dict(enc1="layer_2", enc2="layer_4", enc3="layer_7", enc4="layer_14", enc5=last)
    stages |= dict(low_level="layer_4", out=last)
  stages |= dict(aspp="aspp/projection", decoder="decoder/conv1")
  if name in stages:
    return stages[name]
  for pattern, ours in ENDPOINTS:
    if re.fullmatch(pattern, name):
      return re.sub(pattern, ours, name)
  return name


def shapes(table):
  """{key: shape} of a network's `state_dict`."""
  rows = (row.split("\t") for row in table.splitlines())
  return {key: () if shape == "scalar" else tuple(int(n) for n in shape.split("x")) for key, shape, _ in rows}


def abstract(case):
  network, options = CASES[case]
  num_classes = 1000 if network.startswith("timm") or network.endswith("vgg16") else 21
  return nnx.eval_shape(lambda: pretrained.build(network, num_classes=num_classes, rngs=nnx.Rngs(0), **options))


def seeded_model(case, keys, gain):
  model = abstract(case)
  arrays = {k: v for k, v in keys.items() if not k.endswith("num_batches_tracked")}
  arrays = seeded.torch_weights(arrays, gain)
  if "features_only" in case:  # No classifier.
    arrays |= {"head.fc.weight": np.zeros((1000, 2048), np.float32), "head.fc.bias": np.zeros(1000, np.float32)}
  pretrained.assign(model, arrays, CASES[case][0].partition("/")[0])
  return model


def forward(model, image):
  """Output and end points, [1, C, H, W] as PyTorch's; at full float32 precision."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def run(state, image):
    endpoints = {}
    output = nnx.merge(graphdef, state)(image, endpoints=endpoints)
    return output, endpoints

  with jax.default_matmul_precision("highest"):
    output, endpoints = jax.tree.map(np.asarray, run(state, image))
  return output, {name: x.transpose(0, 3, 1, 2) for name, x in endpoints.items()}


def errors(case, keys, z):
  """{size/output: largest difference, in units of PyTorch's own float32 noise} of everything a fixture holds."""
  model = seeded_model(case, keys, float(z["gain"]))
  found = {}
  for size in sorted({name.partition("/")[0] for name in z.files if "/" in name}):
    h, w = (int(n) for n in size.split("x"))
    image = np.random.default_rng(0).standard_normal([1, 3, h, w]).astype(np.float32)
    output, endpoints = forward(model, image.transpose(0, 2, 3, 1))
    final = "out" if case.startswith("torchvision_") and "vgg" not in case else "logits"
    for name in [
      key.removesuffix("__shape").partition("/")[2]
      for key in z.files
      if key.startswith(size) and key.endswith("__shape")
    ]:
      key = f"{size}/{name}"
      if name == final:
        got = output.transpose(0, 3, 1, 2) if output.ndim == 4 else output
      elif name == "aux":
        got = np.asarray(resize.resize_bilinear(endpoints["auxiliary"].transpose(0, 2, 3, 1), (h, w), False)).transpose(
          0, 3, 1, 2
        )
      else:
        got = endpoints[end_point(name, model, endpoints)]
      assert got.shape == tuple(z[f"{key}__shape"]), name
      found[key] = float(np.abs(got.ravel()[z[f"{key}__probe_index"]] - z[f"{key}__probe"]).max())
      if key in z:
        found[key] = max(found[key], float(np.abs(got - z[key]).max()))
      found[key] /= float(z[f"{key}__f32_noise"])
  return found
