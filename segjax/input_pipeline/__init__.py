"""From files to host batches. Nothing below this package imports JAX, so data workers stay free of it.

A source is random access to examples: `len(source)`, `source[i]` -> (image, label), `source.describe(i)`, and the facts
`classes`, `palette` [K, 3] uint8, `canvas_size`, `labelled`, `notes` and `submission` (see `source.Source`); its class
tells `named_classes` without any example. `order` says which examples a step sees. A loader reads them:

    batches(positions, load, canvas_size, batch_size, num_workers) -> iterator of dicts

Batches hold this host's rows: `image` [b, H, W, 3] uint8 and `label` [b, H, W] uint8 on the split's canvas, padded at
the bottom and right; where asked for, `border` [b, H, W] float16; `size` [b, 2] int32, each image's own height and
width; `id` [b] int32.
"""

import functools
import importlib.util
from collections.abc import Iterator

import numpy as np

from segjax import config as config_lib
from segjax.input_pipeline import datasets, order
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.input_pipeline.cityscapes import CityscapesSource
from segjax.input_pipeline.folder import FolderSource
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.kitti_road import KittiRoadSource
from segjax.input_pipeline.synthetic import SyntheticSource
from segjax.input_pipeline.tfds_source import TfdsSource
from segjax.input_pipeline.voc import VocSource

SOURCES = {
  "synthetic": SyntheticSource, "folder": FolderSource, "voc": VocSource, "cityscapes": CityscapesSource,
  "tfds": TfdsSource, "kitti_road": KittiRoadSource,
}  # fmt: skip
# Imported when asked for: a run with grain must not import TensorFlow, nor the other way round.
_LOADERS = {"tf_data": "segjax.input_pipeline.tf_data", "grain": "segjax.input_pipeline.grain_loader"}


def make_source(data, split: str, labels: bool = True):
  """The source of one split from `config.data`.

  Args:
    labels: whether they are needed; predicting works without.

  Raises:
    DataError: the data set cannot be used, or has no public labels for this split; the message says why.
  """
  options = {name: data[name] for name in config_lib.SOURCES[data.name]}
  source = SOURCES[data.name](dir=data.dir, split=split, **options)
  if labels and not source.labelled:
    raise DataError(
      f"Split {split!r} of {data.name} has no public labels, so it can neither train nor be scored here. Write its"
      f" predictions for the benchmark's server: --mode=predict --config.data.eval_split={split}"
    )
  return source


def named_classes(data) -> tuple[tuple[str, ...], np.ndarray]:
  """Class names and palette [K, 3] uint8 of `config.data`, without reading the data set (but its classes.txt).

  Raises:
    DataError: nobody names the classes.
  """
  options = {name: data[name] for name in config_lib.SOURCES[data.name]}
  return SOURCES[data.name].named_classes(dir=data.dir, **options)


def canvas_of(source, data) -> tuple[int, int]:
  """(H, W) of the split's canvas: `data.canvas_size`, or the size of the largest image.

  Raises:
    DataError: an image larger than `data.canvas_size`.
  """
  if not any(data.canvas_size):
    return source.canvas_size
  if any(image > canvas for image, canvas in zip(source.canvas_size, data.canvas_size)):
    raise DataError(
      f"data.canvas_size = {tuple(data.canvas_size)} is smaller than the largest image, {source.canvas_size}. Set"
      " data.canvas_size=(0,0) to fit them all, or shrink the images."
    )
  return tuple(data.canvas_size)


def facts(data, split: str) -> tuple[int, tuple[int, int], str]:
  """Number of classes and canvas (H, W) of a split, and where they are from.

  From the data set; without it from the config, or from what is known of benchmarks.

  Raises:
    ConfigError: the data set cannot be used, and what it would tell is not known otherwise.
    DataError: classes and colours that contradict each other.
  """
  try:
    source = make_source(data, split)
    return len(source.classes), canvas_of(source, data), f"{len(source)} images in {split!r} of {data.name}"
  except DataError as error:
    why = str(error).splitlines()[0]
  missing = []
  try:
    num_classes = len(named_classes(data)[0])
  except DataError:
    if data.classes:
      raise
    missing.append("data.classes")
  known = datasets.LARGEST[data.name] if data.name in datasets.LARGEST else (0, 0)
  canvas = tuple(data.canvas_size) if any(data.canvas_size) else known
  if not any(canvas):
    missing.append("data.canvas_size")
  if missing:
    raise config_lib.ConfigError(f"{why}\nWithout the data set, {' and '.join(missing)} must be set.")
  return num_classes, canvas, f"not at hand ({why})"


def load_example(source, canvas_size: tuple[int, int], index: int, border: bool = False) -> dict[str, np.ndarray]:
  """Example `index` at its own size; `order.PADDING` gives one without pixels, which is all void on the canvas.

  Args:
    border: adds `border`, the source's map of pixel weights.

  Raises:
    DataError: an image larger than the canvas (a file that changed since start-up), or what the source raises.
  """
  if index == order.PADDING:
    pixels, classes = np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8)
  else:
    pixels, classes = source[int(index)]
  h, w = classes.shape
  if h > canvas_size[0] or w > canvas_size[1]:
    raise DataError(
      f"{source.describe(int(index))} is {h}x{w}, larger than the canvas {canvas_size}. Restore the file."
    )
  example = dict(image=pixels, label=classes, size=np.array([h, w], np.int32), id=np.array(index, np.int32))
  if border:
    example["border"] = np.zeros((0, 0), np.float16) if index == order.PADDING else source.border(int(index))
  return example


def loader_of(data) -> str:
  """The loader that reads for `config.data`: what it names, but grain where TensorFlow is not installed."""
  return data.loader if data.loader == "grain" or _tensorflow_is_installed() else "grain"


def _tensorflow_is_installed() -> bool:
  try:
    spec = importlib.util.find_spec("tensorflow")
  except (ImportError, ValueError):  # Something forbids its import.
    return False
  return spec is not None and spec.origin is not None  # An uninstalled one may leave a folder behind.


def _batches(
  source, canvas_size, data, ids, rows, start: int, stop: int, border: bool = False, bad: BadExamples | None = None
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the steps [start, stop); `ids(step)` gives the global batch, `rows` this host's part of it."""
  ids = functools.lru_cache(maxsize=64)(ids)

  def load(position: int) -> dict[str, np.ndarray]:
    step, row = divmod(int(position), len(rows))
    row = int(rows[row])
    index = int(ids(step)[row])
    if bad is None:
      return load_example(source, canvas_size, index, border)
    try:
      if (step, row) not in bad:
        return load_example(source, canvas_size, index, border)
    except DataError as error:
      bad.add(step, row, source.describe(index), error)
    return load_example(source, canvas_size, order.PADDING, border) | dict(id=np.array(index, np.int32))

  name = loader_of(data)
  try:
    loader = importlib.import_module(_LOADERS[name])
  except ImportError as error:
    raise config_lib.ConfigError(
      f"The loader {name} cannot be imported ({error}). Repair that installation, or set --config.data.loader=grain: the"
      " batches are the same."
    ) from error
  positions = range(start * len(rows), stop * len(rows))
  return loader.batches(positions, load, canvas_size, len(rows), data.workers)


def train_batches(
  source, data, *, seed, batch_size, rows, start_step, num_steps, border=False, bad=None
) -> Iterator[dict[str, np.ndarray]]:
  """Training batches of steps start_step .. num_steps - 1, the same whatever the loader and the number of hosts.

  Args:
    data: `config.data`.
    batch_size: of the global batch.
    rows: the rows of the global batch that this host loads.
    border: whether batches have `border`, for loss.border_weight.
    bad: the `BadExamples` of a run, whose unreadable examples are all void, up to a number. None: the first one raises.
  """

  def ids(step):
    return order.train_ids(seed, step, batch_size, len(source))

  return _batches(source, canvas_of(source, data), data, ids, rows, start_step, num_steps, border, bad)


def eval_batches(source, data, *, batch_size, rows) -> Iterator[dict[str, np.ndarray]]:
  """Batches that show every example once, the last one filled up with void examples; arguments as above."""

  def ids(step):
    return order.eval_ids(step, batch_size, len(source))

  stop = order.num_eval_steps(batch_size, len(source))
  return _batches(source, canvas_of(source, data), data, ids, rows, 0, stop)
