"""The training data as the network gets them, before any training: python -m segjax.browse --config=configs/x.py

Writes one HTML page that needs nothing else: the first training crops with their labels painted over, made by the run's own
loader and augmentation, beside the images and labels in the files; how often each class occurs; and what segjax.check_data
complains about, for which it reads both splits once (--nocheck: not).
"""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from segjax.config import IGNORE_LABEL, ConfigError
from segjax.files import atomic
from segjax.input_pipeline import DataError, images, rasters
from segjax.run import commandline

_LARGEST, _THUMBNAIL = 720, 360  # Pixels of the longer side of a picture; larger ones are shrunk.
_SMALL = 200  # Pixels of the longer side, below which single pixels are to be seen.
_MOST_PROBLEMS = 100
_OFF = (0, False, (0.0, 0.0, 0.0))  # Of the fields of config.augment.


class Sample(NamedTuple):
  """One training example, as a step sees it.

  Attributes:
    step, row: its place, the step from 1 as in a run's lines, the row of the global batch from 0.
    index: of the example in its source.
    problem: why its files cannot be read, so that it is all void; or "".
    image: [h + 2 margin, w + 2 margin, C] float32 in the units of the files. label: [h, w] int32.
  """

  step: int
  row: int
  index: int
  problem: str
  image: np.ndarray
  label: np.ndarray


class _Unreadable(dict):
  """What a loader needs of `BadExamples`: {(step, row): why it is void}, any number of them, without a record."""

  def add(self, step: int, row: int, name: str, error: DataError) -> None:
    self[step, row] = str(error)


def samples(experiment, count: int) -> list[Sample]:
  """The first `count` training examples of a run in their order.

  Raises:
    ConfigError, DataError: what would stop the run before its first step.
  """
  import jax

  from segjax import sharding, steps

  config, found, unreadable = experiment.config, [], _Unreadable()
  augmented = jax.jit(sharding.on(experiment.mesh)(experiment.augment_batch))
  for step, batch in enumerate(experiment.train_batches(0, -(-count // config.batch_size), bad=unreadable)):
    crops = jax.device_get(augmented(steps.keys_of(config.seed, step)[0], batch)[:2])
    for row, (index, image, label) in enumerate(zip(batch["id"].tolist(), *crops)):
      found.append(Sample(step + 1, row, index, unreadable.get((step, row), ""), image, label))
  return found[:count]


class _Picture(NamedTuple):
  uri: str
  small: bool  # Whether single pixels are to be seen.


def _picture(pixels: np.ndarray, largest: int = _LARGEST) -> _Picture:
  """[H, W, 3] uint8 in a data URI: a JPEG, shrunk where large; where small, a PNG with each pixel as it is."""
  from PIL import Image

  from segjax.run import pictures

  image = Image.fromarray(pixels)
  image.thumbnail((largest, largest))
  small = max(image.size) < _SMALL
  return _Picture(pictures.data_uri(image, lossless=small), small)


def _pair(image: np.ndarray, label: np.ndarray, source) -> tuple[_Picture, _Picture]:
  """An image [h + 2 margin, w + 2 margin, C], and the same with the label [h, w] of its middle painted over."""
  from segjax.run import pictures

  dtype = source.pixels.dtype
  image = pictures.visible((np.round(image) if dtype.kind == "u" else image).astype(dtype))
  painted, margin = image.copy(), (image.shape[0] - label.shape[0]) // 2
  inner = np.s_[margin : margin + label.shape[0], margin : margin + label.shape[1]]
  painted[inner] = pictures.paint(image[inner], label.astype(np.uint8), source.palette)
  return _picture(image), _picture(painted)


def _percent(share: float, digits: int) -> str:
  """In %; what would round to 0, and is not, as below the least."""
  least = 10.0**-digits
  return f"< {least:g} %" if 0 < 100 * share < least / 2 else f"{100 * share:.{digits}f} %"


def _shown(sample: Sample, source) -> dict:
  """What the page has of a sample."""
  counts = np.bincount(sample.label.ravel(), minlength=256)
  present = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
  shown = dict(
    name=source.describe(sample.index),
    step=sample.step,
    row=sample.row,
    problem=sample.problem,
    size="{} x {}".format(*sample.label.shape),
    crop=_pair(sample.image, sample.label, source),
    classes=[(number, _percent(counts[number] / counts.sum(), 1)) for number in present],
  )
  if not sample.problem:
    image, label = source[sample.index]
    shown |= dict(raw=_pair(image, label, source), raw_size="{} x {}".format(*label.shape))
  return shown


class _Problem(NamedTuple):
  """What the page has of a problem: where, what, and, where they are known and can be read, example and image."""

  split: str
  text: str
  name: str = ""
  picture: _Picture | None = None


def _problem(split: str, source, index: int | None, text: str) -> _Problem:
  from segjax.run import pictures

  if index is None:
    return _Problem(split, text)
  files, name = source.files()["image"], source.describe(index)
  reading = images.Reading("ignore", channels=source.pixels.channels, depth=source.pixels.depth)
  try:
    picture = _picture(pictures.visible(rasters.read(files[index], reading)), _THUMBNAIL) if files else None
  except DataError:
    picture = None  # The text says what is wrong with it.
  return _Problem(split, text, name, picture)


class _Class(NamedTuple):
  """A row of the table: a class or void.

  Attributes:
    splits: of each split, its share of the pixels as text, and how many images hold it.
    crops: the same of the crops.
    bars: widths of the bars of the first split and of the crops, in % of the widest of all rows.
  """

  name: str
  color: str
  splits: list[tuple[str, int]]
  crops: tuple[str, int]
  bars: list[float]


def _classes(source, counts: dict[str, np.ndarray], shown: Sequence[Sample]) -> dict[int, _Class]:
  """The rows of the table by label value.

  Args:
    counts: {split: [N, 256] label values of each example}, without examples that cannot be read.
  """
  from segjax.run import pictures

  colors = pictures.painted_colors(source.palette)
  of_crops = [np.bincount(sample.label.ravel(), minlength=256) for sample in shown]
  whole = [*counts.values(), np.array(of_crops, int).reshape(-1, 256)]
  shares = [number.sum(0) / max(number.sum(), 1) for number in whole]
  images_with = [(number > 0).sum(0) for number in whole]
  barred = [shares[0], shares[-1]] if counts else [shares[-1]]
  widest = max(max(share) for share in barred) or 1
  rows = {}
  for number, name in [*enumerate(source.classes), (IGNORE_LABEL, "void")]:
    cells = [(_percent(share[number], 2), int(held[number])) for share, held in zip(shares, images_with)]
    bars = [round(float(100 * share[number] / widest), 4) for share in barred]
    unpainted = number == 0 and len(source.classes) == 2  # See `pictures.paint`.
    color = "transparent" if unpainted else "rgb({}, {}, {})".format(*colors[number])
    rows[number] = _Class(name, color, cells[:-1], cells[-1], bars)
  return rows


def _summary(config, source) -> list[str]:
  """Lines on what is shown."""
  acting = ", ".join(f"{name} {value}" for name, value in config.augment.items() if value not in _OFF)
  kind = f"{source.pixels.count} channels of {source.pixels.depth}" if source.pixels.channels else "RGB"
  lines = [
    f"{len(source):,} training images ({config.data.train_split}), {kind}, {len(source.classes)} classes;"
    " crops of {} x {} (height x width)".format(*config.crop_size)
    + f", {config.batch_size} to a step.",
    f"augment: {acting}; data.sampling {config.data.sampling}.",
  ]
  if source.pixels.channels:
    lines.append(
      "Pictures show the first three channels, or one in grey, each stretched from its 2nd percentile to its 98th."
    )
  return lines


def page(config, count: int, check: bool = True) -> tuple[str, int, str]:
  """The page of `count` samples, the number of problems that it names, and why there are no samples, or "".

  Args:
    check: whether both splits are read whole.

  Raises:
    DataError: the training split cannot be opened at all.
    ConfigError: what would stop the run before its first step, but for what is wrong with data.
  """
  import jax
  import jinja2

  from segjax import sharding
  from segjax.experiment import Experiment
  from segjax.run import image_statistics
  from segjax.tools import check_data

  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  source, shown, failure = Experiment(config, mesh=mesh).train_source, [], ""
  try:
    shown = samples(Experiment(image_statistics.resolved(config, None, measure=True), mesh=mesh), count)
  except DataError as error:
    failure = str(error)
  found = check_data.examine(config) if check else check_data.Findings({}, [], [])
  whole = {name: split for name, split in found.splits.items() if split.source is not None}
  listed = [(name, split.source, *problem) for name, split in found.splits.items() for problem in split.problems]
  listed += [("data folders", None, None, problem) for problem in found.others]
  template = pathlib.Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  text = environment.from_string(template).render(
    title=f"Training data: {config.data.dir or config.data.name}",
    summary=_summary(config, source),
    checked=check,
    splits={name: len(split.source) for name, split in whole.items()},
    classes=_classes(source, {name: split.counts for name, split in whole.items()}, shown),
    problems=[_problem(*problem) for problem in listed[:_MOST_PROBLEMS]],
    left_out=max(len(listed) - _MOST_PROBLEMS, 0),
    notes=[note for split in whole.values() for note in split.source.notes] + found.notes,
    failure=failure,
    samples=[_shown(sample, source) for sample in shown],
  )
  return text.encode(errors="backslashreplace").decode(), len(listed), failure  # Paths need not be UTF-8.


def browse(config, out: pathlib.Path, count: int, check: bool = True) -> None:
  """Writes `page` and says what it holds.

  Raises:
    ConfigError: the page cannot be written there; or what `page` raises.
    DataError: what `page` raises.
  """
  if not out.parent.is_dir() or out.is_dir() or not os.access(out.parent, os.W_OK):
    raise ConfigError(
      f"--out={out}: no file can be written there. Name one in a folder that exists and can be written."
    )
  text, problems, failure = page(config, count, check)
  try:
    atomic.write_text(out, text)
  except OSError as error:
    raise ConfigError(f"--out={out} cannot be written ({error}). Name another file.") from error
  found = f"{problems} problem(s) found, listed there" if problems else "no problems found"
  print(f"{out}: {len(text) / 1e6:.1f} MB; {found if check else 'not checked'}")
  if failure:
    print(f"No crops can be made yet: {failure}")


def _define_flags() -> None:
  # Not at import, where prepare's flag of that name would be in the way.
  commandline.define_path("out", "browse.html", "The page to write.")
  flags.DEFINE_integer("samples", 16, "How many training examples it shows.", lower_bound=1)
  flags.DEFINE_bool("check", True, "Whether both splits are read for the classes' shares and the problems.")


def main(argv: list[str]) -> None:
  """The command line."""
  del argv
  args = flags.FLAGS
  with commandline.readable_errors():
    config = commandline.config()
    os.environ["JAX_PLATFORMS"] = "cpu"  # Crops are soon made, and an accelerator that is here may be in use.
    commandline.enable_float64(config)
    browse(config, pathlib.Path(args.out), args.samples, args.check)


if __name__ == "__main__":
  _define_flags()
  commandline.run(main)
