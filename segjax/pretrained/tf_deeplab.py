"""Official TensorFlow DeepLab: variable names of its checkpoints -> our paths.

Names are those of research/deeplab in tensorflow/models, without ":0", for Xception-41/65/71 and MobileNetV2 backbones.
The ImageNet checkpoints of these backbones fit too: their classifier becomes `logits`, which the caller excludes.
Where batch norm was folded into the convolution, as in published TFLite files, a layer has "biases" in its place.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from segjax.models import aspp, backbones

# Not weights: the step, and what optimisers and moving averages keep beside each variable.
IGNORED = re.compile(r"^global_step$|(/|^)(Momentum|Adam|Adam_1|RMSProp|RMSProp_1|ExponentialMovingAverage)$")

# Prefixes (of whole components) of official names, the first that fits.
PREFIXES = (
  (r"xception_\d+/(entry|middle|exit)_flow/block(\d+)/unit_(\d+)/xception_module/", r"backbone/\1_block\2/unit\3/"),
  (r"xception_\d+/entry_flow/(conv1_[12])/", r"backbone/\1/"),
  (r"MobilenetV2/Conv/", "backbone/layer_1/"),
  (r"MobilenetV2/expanded_conv/", "backbone/layer_2/"),
  (r"MobilenetV2/expanded_conv_(\d+)/", lambda match: f"backbone/layer_{int(match[1]) + 2}/"),
  (r"image_pooling/", "aspp/pooling/"),
  (r"aspp(\d+)(_depthwise|_pointwise)/", r"aspp/branch\1/branch\2/"),
  (r"aspp(\d+)/", r"aspp/branch\1/"),
  (r"concat_projection/", "aspp/projection/"),
  (r"decoder/feature_projection0/", "decoder/low_level/"),
  (r"decoder/decoder_conv(\d+)(_depthwise|_pointwise)/", lambda m: f"decoder/conv{int(m[1]) + 1}/branch{m[2]}/"),
  (r"decoder/decoder_conv0/decoder_conv0_(\d+)/", r"decoder/conv\1/"),
  (r"logits/semantic/", "logits/"),
  (r"xception_\d+/logits/", "logits/"),
  (r"MobilenetV2/Logits/Conv2d_1c_1x1/", "logits/"),
  (r"MobilenetV2/Conv_1/", "logits/wide/"),
)

# Of batch norm, by prefix; both backbones have the same.
EPSILONS = ((r"(xception_\d+|MobilenetV2)/", backbones.OFFICIAL.mobilenet_epsilon), (r"", aspp.HEAD_EPSILON))

# Layers inside a prefix, then leaves. What is neither half of a separable convolution is a ConvNorm.
NORM = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def rename(name: str) -> tuple[str, str] | None:
  """("params" or "batch_stats", our path) of an official variable name; None where the scheme has no such name."""
  for pattern, replacement in PREFIXES:
    path, found = re.subn(f"^{pattern}", replacement, name)
    if found:
      break
  else:
    return None
  path = re.sub(r"/separable_conv(\d)_", r"/sep\1/branch_", path)
  *scopes, leaf = path.split("/")
  normed = bool(scopes) and scopes[-1] == "BatchNorm"
  scopes = scopes[:-1] if normed else scopes
  half = re.fullmatch(r"(?:branch_)?(depthwise|pointwise)", scopes[-1])
  if normed and leaf in NORM:
    scopes = [*scopes[:-1], f"{half[1]}_norm"] if half else [*scopes, "norm"]
    return "batch_stats" if leaf.startswith("moving_") else "params", "/".join([*scopes, NORM[leaf]])
  if half and leaf == ("depthwise_weights" if half[1] == "depthwise" else "weights"):
    return "params", "/".join([*scopes[:-1], half[1], "depthwise_kernel" if half[1] == "depthwise" else "kernel"])
  if not half and not normed and leaf == "weights":
    return "params", "/".join([*scopes, "kernel"] if scopes == ["logits"] else [*scopes, "conv", "kernel"])
  if scopes == ["logits"] and leaf == "biases":
    return "params", "logits/bias"
  return None


def unfold(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Gives each layer that has "biases" instead of a batch norm one that adds them: mean 0, variance 1."""
  result = dict(arrays)
  for name, bias in arrays.items():
    scope = name.removesuffix("/biases")
    normed = f"{scope}/BatchNorm/beta"
    if scope != name and rename(name) is None and rename(normed) is not None and normed not in arrays:
      epsilon = next(epsilon for prefix, epsilon in EPSILONS if re.match(prefix, scope))
      ones = np.ones_like(result.pop(name))
      leaves = dict(gamma=np.sqrt(1 + epsilon) * ones, beta=bias, moving_mean=0 * ones, moving_variance=ones)
      result |= {f"{scope}/BatchNorm/{leaf}": np.asarray(array, bias.dtype) for leaf, array in leaves.items()}
  return result


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """{"params": ..., "batch_stats": ...} in our paths and layouts, of official variables by name.

  Kernels are [kh, kw, in, out] on both sides; depthwise ones [3, 3, C, 1] there and [3, 3, 1, C] here. A bias in the place
  of a batch norm becomes one of mean 0, variance 1 and a scale that cancels epsilon.

  Raises:
    ValueError: listing every name that the scheme does not know, but for optimiser slots, moving averages and
      `global_step`, which are dropped.
  """
  renamed, unknown = {}, []
  for name, array in unfold(arrays).items():
    if IGNORED.search(name):
      continue
    place = rename(name)
    if place is None:
      unknown.append(name)
      continue
    renamed["/".join(place)] = np.swapaxes(array, 2, 3) if name.endswith("/depthwise_weights") else np.asarray(array)
  if unknown:
    raise ValueError(
      f"{len(unknown)} names are none of official DeepLab's; drop them or choose another init.scheme:\n  "
      + "\n  ".join(sorted(unknown)[:40])
    )
  return traverse_util.unflatten_dict(renamed, sep="/")
