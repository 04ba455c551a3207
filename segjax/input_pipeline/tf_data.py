"""The tf.data loader: reads and decodes in TensorFlow's thread pool, in order."""

import atexit
import os
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from segjax.config import IGNORE_LABEL

tf.config.set_visible_devices([], "GPU")  # It would reserve the memory that JAX needs.

_SPEC = dict(image=tf.uint8, label=tf.uint8, size=tf.int32, id=tf.int32)
_started = weakref.WeakSet()


@atexit.register
def _close_all():
  """Ends iterators that a failing program left in the middle: once Python shuts down, TensorFlow would wait for ever for
  reads under way, whose threads Python has ended.
  """
  for iterator in list(_started):
    iterator.close()


def batches(positions: range, load: Callable[[int], dict], canvas_size: tuple[int, int], batch_size: int,
            num_workers: int) -> Iterator[dict]:  # fmt: skip
  """`load(position)` of consecutive positions, padded to the canvas, `batch_size` at a time.

  Args:
    num_workers: threads; 0 for one per core.

  Raises:
    Whatever `load` raises, unchanged, when the batch that needs it is due.
  """
  iterator = _iterate(positions, load, canvas_size, batch_size, num_workers)
  _started.add(iterator)
  return iterator


def _iterate(positions, load, canvas_size, batch_size, num_workers):
  failures = []

  def load_flat(position):
    try:
      example = load(int(position))
    except Exception as error:  # TensorFlow would turn it into an opaque UnknownError: keep it for the consumer.
      failures.append(error)
      raise
    return [example[name] for name in _SPEC]

  def read(position):
    flat = tf.numpy_function(load_flat, [position], list(_SPEC.values()))
    for tensor, rank in zip(flat, (3, 2, 1, 0)):
      tensor.set_shape([None] * rank)
    return dict(zip(_SPEC, flat))

  workers = num_workers or os.cpu_count()
  dataset = tf.data.Dataset.range(positions.start, positions.stop)
  dataset = dataset.map(read, num_parallel_calls=workers, deterministic=True)
  shapes = dict(image=(*canvas_size, 3), label=canvas_size, size=(2,), id=())
  filling = dict(image=0, label=IGNORE_LABEL, size=0, id=0)
  filling = {name: tf.constant(value, _SPEC[name]) for name, value in filling.items()}
  dataset = dataset.padded_batch(batch_size, shapes, filling, drop_remainder=True).prefetch(2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = workers
  try:
    for batch in dataset.with_options(options):
      yield {name: np.asarray(memoryview(tensor.numpy())) for name, tensor in batch.items()}
  except tf.errors.OpError as error:
    if failures:
      raise failures[0] from error
    raise
