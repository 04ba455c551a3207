"""A first layer for images of other channels than the RGB that its weights were trained on."""

import math

import numpy as np
from flax import traverse_util

RGB = 3


def adapt(variables: dict, imported: dict, channels: int) -> tuple[dict, str]:
  """`imported` with the kernels of RGB that the model has for `channels`, as timm makes them (`adapt_input_conv`).

  Of one channel: the sum over red, green and blue. Of more: those of red, green, blue, red, ... times 3 / channels, so that
  activations keep their size.

  Args:
    variables, imported: {"params": ..., "batch_stats": ...} of the model, and those to give it.

  Returns:
    What to import, and a sentence about what was adapted, or "".
  """
  ours, theirs = (traverse_util.flatten_dict(x, sep="/") for x in (variables, imported))
  adapted = {}
  for name in ours.keys() & theirs.keys() if channels != RGB else ():
    kernel, shape = np.asarray(theirs[name]), ours[name].shape
    if kernel.ndim == 4 and kernel.shape[2] == RGB and shape == (*kernel.shape[:2], channels, kernel.shape[3]):
      cycle = np.tile(kernel, (1, 1, math.ceil(channels / RGB), 1))[:, :, :channels] * np.float32(RGB / channels)
      adapted[name] = kernel.sum(2, keepdims=True) if channels == 1 else cycle
  if not adapted:
    return imported, ""
  how = "the sum of red, green and blue" if channels == 1 else f"red, green, blue, red, ... times 3/{channels}"
  line = f"{', '.join(sorted(adapted))}: of RGB, for {channels} channels made {how}"
  return traverse_util.unflatten_dict(theirs | adapted, sep="/"), line
