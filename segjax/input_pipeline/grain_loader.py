"""The grain loader: reads and decodes in threads (Pillow releases the interpreter lock), without TensorFlow."""

import functools
import os
from collections.abc import Callable, Iterator

import grain

from segjax.input_pipeline.canvas import pad_batch


def batches(
  positions: range, load: Callable[[int], dict], canvas_size: tuple[int, int], batch_size: int, num_workers: int
) -> Iterator[dict]:
  """Yields `load(position)` of consecutive positions, padded to the canvas, `batch_size` at a time.

  Args:
    num_workers: threads; 0 for one per core.

  Raises:
    Whatever `load` raises, when the batch that needs it is due.
  """
  options = grain.ReadOptions(num_threads=num_workers or os.cpu_count(), prefetch_buffer_size=2 * batch_size)
  dataset = grain.MapDataset.range(positions.start, positions.stop).map(load)
  # Threads prefetch examples; batching happens in the iterator, after them.
  pad = functools.partial(pad_batch, canvas_size=canvas_size)
  yield from dataset.to_iter_dataset(options).batch(batch_size, drop_remainder=True, batch_fn=pad)
