"""milesial/Pytorch-UNet: the padded U-Net of depth 4 with batch norm, upsampled by transposed convolutions or bilinearly."""

from collections.abc import Mapping

import numpy as np

from segjax.pretrained import state_dict

# Index in a `double_conv`, and our layer.
PARTS = {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2"}


def up(path: str):
  """A path with our level of its "up1", the coarsest, to "up4", for `state_dict.rename`."""
  return lambda match: path.format(4 - int(match[1]))


MODULES = (
  *((rf"inc\.double_conv\.{n}", f"down0/{part}") for n, part in PARTS.items()),
  *((rf"down(\d)\.maxpool_conv\.1\.double_conv\.{n}", rf"down\1/{part}") for n, part in PARTS.items()),
  *((rf"up(\d)\.conv\.double_conv\.{n}", up(f"up{{}}/{part}")) for n, part in PARTS.items()),
  (r"up(\d)\.up", up("upconv{}")),
  (r"outc\.conv", "logits"),
)


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """Our paths and layouts of a `state_dict`, see `state_dict.convert`.

  Its checkpoints also hold `mask_values`, the masks' pixel values, which is no weight and dropped.
  """
  weights = {name: array for name, array in arrays.items() if name != "mask_values"}
  layouts = ((r"upconv\d", lambda kernel: kernel.transpose(2, 3, 0, 1)),)  # [in, out, kh, kw].
  return state_dict.convert(weights, MODULES, "milesial/Pytorch-UNet", layouts)
