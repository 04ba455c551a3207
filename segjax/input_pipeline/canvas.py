"""Examples of several sizes in one batch."""

from collections.abc import Sequence

import numpy as np

from segjax.config import IGNORE_LABEL


def pad_batch(examples: Sequence[dict], canvas_size: tuple[int, int]) -> dict[str, np.ndarray]:
  """{name: array} per example to {name: array} of the batch: images and labels in the top left of a canvas, void around.

  Straight into the batch: a canvas per example would be one more copy.

  Args:
    examples: `image` [h, w, 3] uint8, `label` [h, w] uint8, `size` [2] int32, `id` int32; h and w at most the canvas'.
    canvas_size: (H, W).
  """
  image = np.zeros((len(examples), *canvas_size, 3), np.uint8)
  label = np.full((len(examples), *canvas_size), IGNORE_LABEL, np.uint8)
  for i, example in enumerate(examples):
    h, w = example["label"].shape
    image[i, :h, :w], label[i, :h, :w] = example["image"], example["label"]
  return dict(image=image, label=label, **{name: np.stack([e[name] for e in examples]) for name in ("size", "id")})
