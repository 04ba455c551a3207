"""Facts of data sets, once: class names, colours, label values. Plain values, so configs and sources can share them."""

import numpy as np

# CamVid, 11 classes as SegNet used them (Badrinarayanan et al. 2017); 367 train, 101 val, 233 test images, 360x480.
# Fields of config.data for the `folder` source, SegNet's layout.
CAMVID = dict(
  images="{split}",
  masks="{split}annot",
  classes=("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian",
           "Bicyclist"),
  colors=("808080", "800000", "C0C080", "804080", "3C28DE", "808000", "C08080", "404080", "400080", "404000", "0080C0"),
  label_map="11:255",
)  # fmt: skip

VOID_COLOR = (224, 224, 192)  # The cream that PASCAL VOC draws void in.


def palette(num_classes: int) -> np.ndarray:
  """The PASCAL VOC colour map, [num_classes, 3] uint8: the bits of an id spread over red, green and blue."""
  ids = np.arange(num_classes)
  colors = np.zeros((num_classes, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      colors[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
  return colors


def parse_colors(colors) -> np.ndarray:
  """("FF0000", "#00FF00") -> [N, 3] uint8.

  Raises:
    ValueError: naming the item that is not six hexadecimal digits.
  """
  rows = []
  for color in colors:
    digits = str(color).lstrip("#")
    if len(digits) != 6 or any(c not in "0123456789abcdefABCDEF" for c in digits):
      raise ValueError(f"{color!r} is not a colour: give six hexadecimal digits, e.g. 804080.")
    rows.append([int(digits[i : i + 2], 16) for i in (0, 2, 4)])
  return np.array(rows, np.uint8).reshape(-1, 3)
