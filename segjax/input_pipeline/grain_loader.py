"""The grain loader: reads and decodes in threads (Pillow releases the interpreter lock), without TensorFlow."""

import os
from collections.abc import Callable, Iterator

import grain


def batches(positions: range, load: Callable[[int], dict], batch_size: int, num_workers: int,
            border: bool = False) -> Iterator[dict]:  # fmt: skip
  """Yields `load(position)` of consecutive positions, stacked `batch_size` at a time.

  Args:
    num_workers: threads; 0 for one per core.
    border: whether examples have `border`; here it makes no difference.

  Raises:
    Whatever `load` raises, when the batch that needs it is due.
  """
  options = grain.ReadOptions(num_threads=num_workers or os.cpu_count(), prefetch_buffer_size=2 * batch_size)
  dataset = grain.MapDataset.range(positions.start, positions.stop).map(load)
  # Threads prefetch examples; batching happens in the iterator, after them.
  yield from dataset.to_iter_dataset(options).batch(batch_size, drop_remainder=True)
