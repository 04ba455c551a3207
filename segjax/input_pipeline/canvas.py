"""Examples of several sizes in one batch."""

from collections.abc import Sequence

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import order

MOSTLY = 0.5  # Share of padding from which a canvas for all images is more padding than images.
_SHARE = 0x5348415245  # Makes these draws differ from those of `order`.
FILL = dict(image=0, label=IGNORE_LABEL, border=0)  # Of the canvas around what has a height and width.


def pad_batch(examples: Sequence[dict], canvas_size: tuple[int, int]) -> dict[str, np.ndarray]:
  """{name: array} per example to {name: array} of the batch: images and labels in the top left of a canvas, void around.

  Straight into the batch: a canvas per example would be one more copy.

  Args:
    examples: `image` [h, w, C], `label` [h, w] uint8, `size` [2] int32, `id` int32, and all or none `border`
      [h, w]; h and w at most the canvas'.
    canvas_size: (H, W).
  """
  batch = {}
  for name, first in examples[0].items():
    if name not in FILL:
      batch[name] = np.stack([example[name] for example in examples])
      continue
    batch[name] = np.empty((len(examples), *canvas_size, *first.shape[2:]), first.dtype)
    for row, example in zip(batch[name], examples):
      h, w = example[name].shape[:2]
      row[:h, :w], row[:h, w:], row[h:] = example[name], FILL[name], FILL[name]  # Each pixel is written once.
  return batch


def padding_share(sizes: Sequence[tuple[int, int]], canvas_size: tuple[int, int]) -> float:
  """Share of padding in the canvases of images of these sizes, at most as large as the canvas in each direction."""
  shown = np.minimum(sizes, canvas_size).astype(np.int64)
  return 1 - float(shown.prod(1).mean()) / (canvas_size[0] * canvas_size[1])


def groups(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
  """Few canvases, (H, W) from small to large; each image lies on the first that holds it.

  One, the size of the largest image, unless it would be mostly padding. Then the images that fit half its height and width
  have others, by the same rule. So their number is at most the logarithm of the largest side.
  """
  sizes = np.asarray(sizes)
  whole = tuple(sizes.max(0).tolist())
  small = (2 * sizes <= whole).all(1)
  if padding_share(sizes, whole) <= MOSTLY or not small.any():
    return [whole]
  return [*groups(sizes[small]), tuple(sizes[~small].max(0).tolist())]


def cut_window(
  example: dict, canvas_size: tuple[int, int], around: tuple[int, int], draw: tuple[int, int, int]
) -> dict:
  """An example cut to the part of its image that its crop will show, where the image is longer than the canvas.

  The position of a crop is uniform among all positions at its scale. So the host draws which share of the positions lies
  before it, and cuts out what the crop at this share shows at any scale; `augment.random_crop` draws the scale, and takes
  that crop. Along sides that fit the canvas nothing is cut, and `augment.random_crop` draws the position itself.

  Args:
    canvas_size: (H, W), at least the size that `augment.crop_window` gives, where that is less than the image's.
    around: (h, w) of `augment.crop_window`.
    draw: (seed, step, row of the global batch), from which the share follows.

  Returns:
    The example; with `origin` [2] int32, the pixel of the image that it begins with, and `share` [2] float32 in [0, 1), or
    -1 where nothing was drawn. `size` is still the whole image's.
  """
  origin, share = np.zeros(2, np.int32), np.full(2, -1, np.float32)
  for axis, (length, window, beside) in enumerate(zip(example["size"].tolist(), canvas_size, around)):
    if length > window:
      share[axis] = int(order.mix(*draw, axis, _SHARE)) >> 40
      share[axis] /= 2**24  # Exact: float32 has 24 bits.
      before = int(float(share[axis]) * (length - 1 - (window - 2 * beside))) - beside
      origin[axis] = min(max(before, 0), length - window)
  part = tuple(slice(start, start + window) for start, window in zip(origin.tolist(), canvas_size))
  cut = {name: value[part] if name in FILL else value for name, value in example.items()}
  return cut | dict(origin=origin, share=share)
