"""The grain loader: reads and decodes in threads (Pillow releases the interpreter lock), without TensorFlow."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from segjax.config import IGNORE_LABEL


def batches(positions: range, load: Callable[[int], dict], canvas_size: tuple[int, int], batch_size: int,
            num_workers: int) -> Iterator[dict]:  # fmt: skip
  """Yields `load(position)` of consecutive positions, padded to the canvas, `batch_size` at a time.

  Args:
    num_workers: threads; 0 for one per core.

  Raises:
    Whatever `load` raises, when the batch that needs it is due.
  """
  options = grain.ReadOptions(num_threads=num_workers or os.cpu_count(), prefetch_buffer_size=2 * batch_size)
  dataset = grain.MapDataset.range(positions.start, positions.stop).map(load)
  # Threads prefetch examples; batching happens in the iterator, after them.
  pad = functools.partial(_pad_batch, canvas_size=canvas_size)
  yield from dataset.to_iter_dataset(options).batch(batch_size, drop_remainder=True, batch_fn=pad)


def _pad_batch(examples: Sequence[dict], canvas_size: tuple[int, int]) -> dict[str, np.ndarray]:
  """Examples onto one canvas each, straight into the batch: a canvas per example would be one more copy."""
  image = np.zeros((len(examples), *canvas_size, 3), np.uint8)
  label = np.full((len(examples), *canvas_size), IGNORE_LABEL, np.uint8)
  for i, example in enumerate(examples):
    h, w = example["label"].shape
    image[i, :h, :w], label[i, :h, :w] = example["image"], example["label"]
  return dict(image=image, label=label, **{name: np.stack([e[name] for e in examples]) for name in ("size", "id")})
