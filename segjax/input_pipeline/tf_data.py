"""The tf.data loader: reads and decodes in TensorFlow's thread pool, in order."""

import atexit
import os
import weakref
from collections.abc import Callable, Iterator

import tensorflow as tf

from segjax.input_pipeline.canvas import pad_batch

tf.config.set_visible_devices([], "GPU")  # It would reserve the memory that JAX needs.

_started = weakref.WeakSet()


@atexit.register
def _close_all():
  """Closes iterators that a failing program left open: at exit, TensorFlow would wait forever for reads in progress, whose
  threads Python has ended.
  """
  for iterator in list(_started):
    iterator.close()


def batches(
  positions: range, load: Callable[[int], dict], canvas_size: tuple[int, int], batch_size: int, num_workers: int
) -> Iterator[dict]:
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
  loaded = {}  # Pixels stay NumPy's: through TensorFlow go positions alone, which spares two copies of every image.

  def read(position):
    try:
      loaded[int(position)] = load(int(position))
    except Exception as error:  # For the consumer, when its batch is due; TensorFlow would make it an UnknownError.
      loaded[int(position)] = error
    return position

  workers = num_workers or os.cpu_count()
  dataset = tf.data.Dataset.range(positions.start, positions.stop)
  dataset = dataset.map(
    lambda position: tf.ensure_shape(tf.numpy_function(read, [position], tf.int64), ()),
    num_parallel_calls=workers,
    deterministic=True,
  )
  dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(2)
  options = tf.data.Options()
  options.threading.private_threadpool_size = workers
  # It has nothing to choose here, and now and then its thread holds up the end: by 47 s after a run of 6 minutes.
  options.autotune.enabled = False
  for batch in dataset.with_options(options):
    examples = [loaded.pop(int(position)) for position in batch.numpy()]
    for example in examples:
      if isinstance(example, Exception):
        raise example
    yield pad_batch(examples, canvas_size)
