"""Module names of the networks' parts that PyTorch's libraries share, as tables for `state_dict.convert`.

The functions for backbones take a regular expression for what stands before these names.
"""

import re
from collections.abc import Collection

from segjax.models.backbones import vgg, xception
from segjax.pretrained.state_dict import Modules, counted

# timm numbers the units of Xception through; a depth has so many.
XCEPTION_DEPTHS = {sum(block[1] for block in xception.blocks(depth)): depth for depth in (41, 65, 71)}


def resnet(prefix: str) -> Modules:
  """torchvision's ResNet, in nearly every library."""
  unit = rf"{prefix}layer([1-4])\.(\d+)\."

  def inside(path):
    return lambda match: f"backbone/block{match[1]}/unit{int(match[2]) + 1}/{path.format(*match.groups()[2:])}"

  return (
    (rf"{prefix}conv1", "backbone/conv1/conv"),
    (rf"{prefix}bn1", "backbone/conv1/norm"),
    (rf"{unit}conv([1-3])", inside("conv{}/conv")),
    (rf"{unit}bn([1-3])", inside("conv{}/norm")),
    (rf"{unit}downsample\.0", inside("shortcut/conv")),
    (rf"{unit}downsample\.1", inside("shortcut/norm")),
  )


def mobilenet_v2(prefix: str) -> Modules:
  """torchvision's MobileNetV2; the first block has no expansion, so all inside it is numbered one lower."""
  return (
    (rf"{prefix}(0|18)\.0", counted("backbone/layer_{}/conv")),
    (rf"{prefix}(0|18)\.1", counted("backbone/layer_{}/norm")),
    (rf"{prefix}1\.conv\.0\.0", "backbone/layer_2/depthwise"),
    (rf"{prefix}1\.conv\.0\.1", "backbone/layer_2/depthwise_norm"),
    (rf"{prefix}1\.conv\.1", "backbone/layer_2/project/conv"),
    (rf"{prefix}1\.conv\.2", "backbone/layer_2/project/norm"),
    (rf"{prefix}(\d+)\.conv\.0\.0", counted("backbone/layer_{}/expand/conv")),
    (rf"{prefix}(\d+)\.conv\.0\.1", counted("backbone/layer_{}/expand/norm")),
    (rf"{prefix}(\d+)\.conv\.1\.0", counted("backbone/layer_{}/depthwise")),
    (rf"{prefix}(\d+)\.conv\.1\.1", counted("backbone/layer_{}/depthwise_norm")),
    (rf"{prefix}(\d+)\.conv\.2", counted("backbone/layer_{}/project/conv")),
    (rf"{prefix}(\d+)\.conv\.3", counted("backbone/layer_{}/project/norm")),
  )


def vgg16_bn(prefix: str) -> Modules:
  """torchvision's VGG-16 with batch norm, which numbers convolutions, batch norms, ReLUs and poolings through."""
  modules, number = [], 0
  for stage, (count, _) in enumerate(vgg.STAGES, start=1):
    for n in range(1, count + 1):
      modules += [
        (rf"{prefix}{number}", f"backbone/conv{stage}_{n}/conv"),
        (rf"{prefix}{number + 1}", f"backbone/conv{stage}_{n}/norm"),
      ]
      number += 3
    number += 1
  return tuple(modules)


def aligned_xception(prefix: str, names: Collection[str]) -> Modules:
  """timm's aligned Xception, its `features_only` form included.

  Args:
    names: all names of the `state_dict`: how many units there are tells the depth. Of another network's, no unit is
      known.
  """
  block = rf"{prefix}blocks[._](\d+)\."
  numbers = {int(match[1]) for name in names if (match := re.match(block, name))}
  depth = XCEPTION_DEPTHS.get(max(numbers) + 1) if numbers else None
  units = (
    [f"{name}/unit{n}" for name, count, *_ in xception.blocks(depth) for n in range(1, count + 1)] if depth else []
  )
  if depth is None:
    block = r"(?!)"  # Fits nothing.

  def inside(path):
    return lambda match: f"backbone/{units[int(match[1])]}/{path.format(*match.groups()[1:])}"

  return (
    (rf"{prefix}stem[._](\d)\.conv", counted("backbone/conv1_{}/conv")),
    (rf"{prefix}stem[._](\d)\.bn", counted("backbone/conv1_{}/norm")),
    (rf"{block}shortcut\.conv", inside("shortcut/conv")),
    (rf"{block}shortcut\.bn", inside("shortcut/norm")),
    (rf"{block}stack\.conv(\d)\.conv_dw", inside("sep{}/depthwise")),
    (rf"{block}stack\.conv(\d)\.bn_dw", inside("sep{}/depthwise_norm")),
    (rf"{block}stack\.conv(\d)\.conv_pw", inside("sep{}/pointwise")),
    (rf"{block}stack\.conv(\d)\.bn_pw", inside("sep{}/pointwise_norm")),
  )


def conv3x3(names: Collection[str], conv: str, norm: str, path: str, halves: str = "") -> Modules:
  """A 3x3 convolution of a head and its batch norm, dense or separable, whichever `names` has.

  Args:
    names: all names of the `state_dict`.
    conv, norm: names of the two modules.
    halves: what stands before "0" and "1", the halves of a separable convolution, inside `conv`.
  """
  if f"{conv}.{halves}0.weight" in names:
    parts = {f"{conv}.{halves}0": "depthwise", f"{conv}.{halves}1": "pointwise", norm: "pointwise_norm"}
  else:
    parts = {conv: "conv", norm: "norm"}
  return tuple((re.escape(name), f"{path}/{part}") for name, part in parts.items())


def aspp(names: Collection[str], prefix: str, halves: str = "") -> Modules:
  """torchvision's ASPP, which the others copied: branches in `convs`, the pooled one last, then `project`.

  Args:
    names, halves: as of `conv3x3`.
  """
  branches = (
    conv3x3(names, f"{prefix}convs.{n}.0", f"{prefix}convs.{n}.1", f"aspp/branch{n}", halves) for n in (1, 2, 3)
  )
  before = re.escape(prefix)
  return (
    (rf"{before}convs\.0\.0", "aspp/branch0/conv"),
    (rf"{before}convs\.0\.1", "aspp/branch0/norm"),
    *(entry for branch in branches for entry in branch),
    (rf"{before}convs\.4\.1", "aspp/pooling/conv"),
    (rf"{before}convs\.4\.2", "aspp/pooling/norm"),
    (rf"{before}project\.0", "aspp/projection/conv"),
    (rf"{before}project\.1", "aspp/projection/norm"),
  )
