"""Examples of several sizes in one batch."""

from collections.abc import Sequence

import numpy as np

from segjax.config import IGNORE_LABEL

FILL = dict(image=0, label=IGNORE_LABEL, border=0)  # Of the canvas around what has a height and width.


def pad_batch(examples: Sequence[dict], canvas_size: tuple[int, int]) -> dict[str, np.ndarray]:
  """{name: array} per example to {name: array} of the batch: images and labels in the top left of a canvas, void around.

  Straight into the batch: a canvas per example would be one more copy.

  Args:
    examples: `image` [h, w, 3] uint8, `label` [h, w] uint8, `size` [2] int32, `id` int32, and all or none `border`
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
