"""The tf.data loader: reads and decodes in TensorFlow's thread pool, in order."""

import atexit
import os
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

tf.config.set_visible_devices([], "GPU")  # It would reserve the memory that JAX needs.

# Type and rank of what an example holds.
_SPEC = dict(image=(tf.uint8, 3), label=(tf.uint8, 2), size=(tf.int32, 1), id=(tf.int32, 0))
_BORDER = dict(border=(tf.float16, 2))
_started = weakref.WeakSet()


@atexit.register
def _close_all():
  """Ends iterators that a failing program left in the middle: once Python shuts down, TensorFlow would wait for ever for
  reads under way, whose threads Python has ended.
  """
  for iterator in list(_started):
    iterator.close()


def batches(positions: range, load: Callable[[int], dict], batch_size: int, num_workers: int,
            border: bool = False) -> Iterator[dict]:  # fmt: skip
  """`load(position)` of consecutive positions, stacked `batch_size` at a time.

  Args:
    num_workers: threads; 0 for one per core.
    border: whether examples have `border`.

  Raises:
    Whatever `load` raises, unchanged, when the batch that needs it is due.
  """
  iterator = _iterate(positions, load, batch_size, num_workers, border)
  _started.add(iterator)
  return iterator


def _iterate(positions, load, batch_size, num_workers, border):
  failures = []
  spec = _SPEC | _BORDER if border else _SPEC

  def load_flat(position):
    try:
      example = load(int(position))
    except Exception as error:  # TensorFlow would turn it into an opaque UnknownError: keep it for the consumer.
      failures.append(error)
      raise
    return [example[name] for name in spec]

  def read(position):
    flat = tf.numpy_function(load_flat, [position], [dtype for dtype, _ in spec.values()])
    for tensor, (_, rank) in zip(flat, spec.values()):
      tensor.set_shape([None] * rank)
    return dict(zip(spec, flat))

  workers = num_workers or os.cpu_count()
  dataset = tf.data.Dataset.range(positions.start, positions.stop)
  dataset = dataset.map(read, num_parallel_calls=workers, deterministic=True)
  dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = workers
  try:
    for batch in dataset.with_options(options):
      yield {name: np.asarray(memoryview(tensor.numpy())) for name, tensor in batch.items()}
  except tf.errors.OpError as error:
    if failures:
      raise failures[0] from error
    raise
