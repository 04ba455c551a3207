"""From files to host batches. Nothing below this package imports JAX, so data workers stay free of it.

A source is random access to examples: `len(source)`, `source[i]` -> (image, label), `source.describe(i)`, and the
attributes that `sources.base.Source` lists; its class gives `named_classes` without any example. `order` says which
examples a step sees. A loader reads them:

    batches(positions, load, canvas_size, batch_size, num_workers) -> iterator of dicts

Batches hold this host's rows: `image` [b, H, W, C] (RGB uint8, but for `images.Pixels`) and `label` [b, H, W] uint8 on the split's canvas, padded at
the bottom and right; where asked for, `border` [b, H, W] float16; `size` [b, 2] int32, each image's own height and
width; `id` [b] int32.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator

import numpy as np

from segjax import config as config_lib
from segjax.input_pipeline import cache, canvas, images, order
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets, make_source, named_classes

# Imported when asked for: a run with grain must not import TensorFlow, nor the other way round.
_LOADERS = {"tf_data": "segjax.input_pipeline.tf_data", "grain": "segjax.input_pipeline.grain_loader"}


def canvas_of(source, data) -> tuple[int, int]:
  """(H, W) that holds all images of a split: `data.canvas_size`, or the size of the largest.

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


def train_canvas(source, data, window) -> tuple[int, int]:
  """(H, W) of the canvas in training: `canvas_of`, unless it would be mostly padding and `data.canvas_size` leaves it open.

  Then larger images are cut (`canvas.cut_window`), and it need be no larger than `window`.

  Args:
    window: of `augment.crop_window`; None: nothing is cut.
  """
  whole = canvas_of(source, data)
  if window is None or any(data.canvas_size) or canvas.padding_share(source.sizes, whole) <= canvas.MOSTLY:
    return whole
  return tuple(min(pair) for pair in zip(whole, window[0]))


def eval_canvases(source, data) -> list[tuple[int, int]]:
  """(H, W) of the canvases of whole images, of which each lies on the first that holds it: one, as `canvas_of`, unless that
  would be mostly padding and `data.canvas_size` leaves it open; see `canvas.groups`.
  """
  whole = canvas_of(source, data)
  return [whole] if any(data.canvas_size) else canvas.groups(source.sizes)


def describe_canvases(train_source, eval_source, data, window, batch_size: int) -> list[str]:
  """Lines on the canvases, their share of padding, and the memory of a training batch of `batch_size`."""
  size, whole = train_canvas(train_source, data, window), canvas_of(train_source, data)
  sizes, evaluation = train_source.sizes, eval_canvases(eval_source, data)

  def with_share(size, sizes):
    return f"{size[0]}x{size[1]}, {100 * canvas.padding_share(sizes, size):.0f} % of it padding"

  def memory(size):
    return f"{train_source.pixels.bytes * batch_size * size[0] * size[1] / 2**20:,.1f} MiB a batch"

  lines = [f"canvas: in training {with_share(size, sizes)} ({memory(size)})"]
  if size != whole:
    lines.append(
      f"note: larger images are cut to what their crops can show. Whole, they would take a canvas of {with_share(whole, sizes)}"
      f" ({memory(whole)}): data.canvas_size={whole[0]},{whole[1]}"
    )
  elif canvas.padding_share(sizes, size) > canvas.MOSTLY:
    remedy = "data.canvas_size=0,0 cuts larger images" if any(data.canvas_size) else "Smaller images would need less"
    lines.append(f"note: most of the training's canvas is padding. {remedy}")
  if len(evaluation) == 1:
    lines[0] += f"; in evaluation {with_share(evaluation[0], eval_source.sizes)}"
  else:
    lines.append(
      f"note: one canvas for all images of the evaluation would be mostly padding, so there are {len(evaluation)}:"
      f" {', '.join(f'{h}x{w}' for h, w in evaluation)}. Images on all but the first go one to a device; eval.window bounds"
      " what they take there"
    )
  return lines


def classes_and_canvas(data, split: str, window=None) -> tuple[int, tuple[int, int], str]:
  """Number of classes and canvas (H, W) of a split, and where they are from.

  They are from the data set; where it is absent, from the config or `datasets.LARGEST`.

  Args:
    window: of `augment.crop_window`, for the canvas of training; None: the whole images'.

  Raises:
    ConfigError: the data set cannot be used, and nothing else gives its classes or canvas.
    DataError: classes and colours that contradict each other.
  """
  try:
    source = make_source(data, split)
    return len(source.classes), train_canvas(source, data, window), f"{len(source)} images in {split!r} of {data.name}"
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
  size = tuple(data.canvas_size) if any(data.canvas_size) else known
  if not any(size):
    missing.append("data.canvas_size")
  if missing:
    raise config_lib.ConfigError(f"{why}\nWithout the data set, {' and '.join(missing)} must be set.")
  return num_classes, size, f"not at hand ({why})"


def class_balance(source, data, counts: np.ndarray) -> order.ClassBalance:
  """How often the examples of a split are drawn with data.sampling = "class_balanced".

  Args:
    counts: of `scan.class_counts`.

  Raises:
    ConfigError: a class that no label holds.
  """
  try:
    return order.ClassBalance(counts, data.sampling_temperature)
  except ValueError as error:
    absent = ", ".join(source.classes[number] for number in error.args[0])
    raise config_lib.ConfigError(
      f"data.sampling = class_balanced: no training label holds {absent}, so no example can be drawn for it. Take it out of"
      " data.classes, check data.label_map, or set data.sampling to uniform."
    ) from error


def load_example(source, canvas_size: tuple[int, int], index: int, border: bool = False) -> dict[str, np.ndarray]:
  """Example `index` at its own size; `order.PADDING` gives one without pixels, which is all void on the canvas.

  Args:
    border: adds `border`, the source's map of pixel weights.

  Raises:
    DataError: an image larger than the canvas (a file that changed since start-up), or what the source raises.
  """
  if index == order.PADDING:
    pixels, classes = np.zeros((0, 0, source.pixels.count), source.pixels.dtype), np.zeros((0, 0), np.uint8)
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
  source,
  canvas_size,
  data,
  ids,
  rows,
  start: int,
  stop: int,
  border: bool = False,
  bad: BadExamples | None = None,
  cut: Callable | None = None,
  kept: str = "none",
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of the steps [start, stop); `ids(step)` gives the global batch, `rows` this host's part of it.

  Args:
    cut: (example, step, row of the global batch) -> an example that fits the canvas. None: all do.
    kept: where decoded examples are kept, as `cache.Cached` has it, or "none".
  """
  ids = functools.lru_cache(maxsize=64)(ids)
  largest = canvas_size if cut is None else canvas_of(source, data)
  if kept != "none":
    source = cache.Cached(source, kept)

  def load(position: int) -> dict[str, np.ndarray]:
    step, row = divmod(int(position), len(rows))
    row = int(rows[row])
    example = load_row(step, row, int(ids(step)[row]))
    return example if cut is None else cut(example, step, row)

  def load_row(step: int, row: int, index: int) -> dict[str, np.ndarray]:
    if bad is None:
      return load_example(source, largest, index, border)
    try:
      if (step, row) not in bad:
        return load_example(source, largest, index, border)
    except DataError as error:
      bad.add(step, row, source.describe(index), error)
    return load_example(source, largest, order.PADDING, border) | dict(id=np.array(index, np.int32))

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
  source, data, *, seed, batch_size, rows, start_step, num_steps, border=False, bad=None, window=None, balance=None
) -> Iterator[dict[str, np.ndarray]]:
  """Training batches of steps start_step .. num_steps - 1, the same for every loader and number of hosts.

  Args:
    data: `config.data`.
    batch_size: of the global batch.
    rows: the rows of the global batch that this host loads.
    border: whether batches have `border`, for loss.border_weight.
    bad: the `BadExamples` of a run, whose unreadable examples are all void, up to a number. None: the first one raises.
    window: of `augment.crop_window`, to which large images are cut where the canvas would be mostly padding; batches then
      have `origin` and `share`, see `canvas.cut_window`. None: never.
    balance: of `class_balance`.
  """
  size = train_canvas(source, data, window)

  def ids(step):
    return order.train_ids(seed, step, batch_size, len(source), balance)

  def cut(example, step, row):
    return canvas.cut_window(example, size, window[1], (seed, step, row))

  cut = None if size == canvas_of(source, data) else cut
  kept = "none" if data.cache == "device" else data.cache
  return _batches(source, size, data, ids, rows, start_step, num_steps, border, bad, cut, kept)


def id_batches(
  source, data, *, seed, batch_size, rows, start_step, num_steps, unreadable, bad=None, window=None, balance=None
) -> Iterator[dict[str, np.ndarray]]:
  """What `train_batches` gives, where all pixels are at hand already: `id` [b] int32, `order.PADDING` for a bad example.

  Args:
    unreadable: {id: DataError} of the examples that this process could not read. It records them for the rows of all.
    Otherwise as of `train_batches`; where that cuts, there are `origin` and `share` too.

  Raises:
    DataError: more are bad than may be.
  """
  if unreadable and (bad is None or len({*bad.names, *map(source.describe, unreadable)}) > bad.most):
    raise DataError(
      f"{len(unreadable)} training examples cannot be read: {images.listed(map(source.describe, unreadable))}."
      f" {next(iter(unreadable.values()))}\nRestore the files; up to data.max_bad_examples (now {data.max_bad_examples})"
      " may be bad."
    )
  size, known = train_canvas(source, data, window), bad if bad is not None else ()
  for step in range(start_step, num_steps):
    ids = order.train_ids(seed, step, batch_size, len(source), balance)
    for row, index in enumerate(ids.tolist()):
      if index in unreadable and (step, row) not in known:
        bad.add(step, row, source.describe(index), unreadable[index])
    void = np.array([(step, row) in known for row in range(batch_size)])
    ids = np.where(void, order.PADDING, ids)[rows].astype(np.int32)
    batch = dict(id=ids)
    if size != canvas_of(source, data):
      sizes = [(0, 0) if index == order.PADDING else source.sizes[index] for index in ids]
      cuts = [canvas.cut_window(dict(size=np.array(s)), size, window[1], (seed, step, r)) for s, r in zip(sizes, rows)]
      batch |= {name: np.stack([cut[name] for cut in cuts]) for name in ("origin", "share")}
    yield batch


def eval_batches(source, data, *, batch_size, rows, single=None, only=None) -> Iterator[dict[str, np.ndarray]]:
  """Batches that show every example once, each batch on one of `eval_canvases`, and filled up with void examples.

  Args:
    single: (batch_size, rows) of images that do not fit the first canvas, which may be large. None: as the others.
    only: ids of the examples to show. None: all.
    Otherwise as above.
  """
  canvases = eval_canvases(source, data)
  kept = "memory" if data.cache == "device" else data.cache
  canvas_number = np.zeros(len(source), int)
  if len(canvases) > 1:
    holds = [(np.array(source.sizes) <= size).all(1) for size in canvases]
    canvas_number = np.argmax(holds, axis=0)
  for number, size in enumerate(canvases):
    members = np.flatnonzero(canvas_number == number)
    members = members if only is None else members[np.isin(members, list(only))]
    if number and single:
      batch_size, rows = single

    def ids(step, members=members, batch_size=batch_size):
      chosen = order.eval_ids(step, batch_size, len(members))
      return np.where(chosen == order.PADDING, order.PADDING, members[chosen])

    count = order.num_eval_steps(batch_size, len(members))
    yield from _batches(source, size, data, ids, rows, 0, count, kept=kept)
