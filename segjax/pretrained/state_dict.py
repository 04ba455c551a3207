"""What the schemes of PyTorch networks share: from a `state_dict` by name to our paths and layouts. Needs no torch.

A scheme is a table of (pattern, path) pairs: the pattern has to match a PyTorch module's whole name, "layer1.0.conv2",
and is replaced, as by `re.sub`, by our module's path, "backbone/block1/unit1/conv2/conv". What a leaf becomes follows from
its name and number of axes.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import traverse_util

Modules = Sequence[tuple[str, str | Callable[[re.Match], str]]]
Layouts = Sequence[tuple[str, Callable[[np.ndarray], np.ndarray]]]

# Leaves that are no kernels: where they belong and what they are called here.
LEAVES = {"bias": ("params", "bias"), "running_mean": ("batch_stats", "mean"), "running_var": ("batch_stats", "var")}


def rename(name: str, modules: Modules) -> str | None:
  """Our path of a PyTorch module by the first pattern that fits; None where there is none."""
  for pattern, path in modules:
    match = re.fullmatch(pattern, name)
    if match:
      return path(match) if callable(path) else match.expand(path)
  return None


def convert(arrays: Mapping[str, np.ndarray], modules: Modules, origin: str, layouts: Layouts = ()) -> dict:
  """{"params": ..., "batch_stats": ...} in our paths and layouts, of a `state_dict`.

  Convolutions [out, in / groups, kh, kw] become [kh, kw, in / groups, out], the depthwise ones among them
  `depthwise_kernel`, [kh, kw, 1, C]; linear layers [out, in] become 1x1 convolutions; a `weight` of one axis is batch
  norm's scale. `num_batches_tracked` is dropped: our running statistics have a fixed momentum.

  Args:
    modules: the scheme's table.
    origin: whose names these are, for messages.
    layouts: (pattern of our module's whole path, function from PyTorch's kernel to ours) where it is another one.

  Raises:
    ValueError: listing every name that the scheme does not know.
  """
  renamed, unknown = {}, []
  for name, array in arrays.items():
    module, _, leaf = name.rpartition(".")
    path, array = rename(module, modules), np.asarray(array)
    if path is None or leaf not in (*LEAVES, "weight", "num_batches_tracked"):
      unknown.append(name)
    elif leaf in LEAVES:
      collection, ours = LEAVES[leaf]
      renamed[f"{collection}/{path}/{ours}"] = array
    elif leaf == "weight" and array.ndim == 1:
      renamed[f"params/{path}/scale"] = array
    elif leaf == "weight":
      own = [change for pattern, change in layouts if re.fullmatch(pattern, path)]
      kernel = "depthwise_kernel" if path.rpartition("/")[2] == "depthwise" else "kernel"
      renamed[f"params/{path}/{kernel}"] = own[0](array) if own else channels_last(array)
  if unknown:
    raise ValueError(
      f"{len(unknown)} names are none of {origin}'s; drop them or choose another init.scheme:\n  "
      + "\n  ".join(sorted(unknown)[:40])
    )
  return traverse_util.unflatten_dict(renamed, sep="/")


def channels_last(kernel: np.ndarray) -> np.ndarray:
  """[out, in, kh, kw] -> [kh, kw, in, out]; a linear layer's [out, in] -> [1, 1, in, out]."""
  if kernel.ndim == 2:
    kernel = kernel[:, :, None, None]
  return kernel.transpose(2, 3, 1, 0)


def counted(path: str) -> Callable[[re.Match], str]:
  """A path for `rename` whose {} take the pattern's groups as numbers counted from 1; PyTorch counts from 0."""
  return lambda match: path.format(*(int(number) + 1 for number in match.groups()))
