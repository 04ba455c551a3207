"""The training data as the network gets them, before any training: python -m segjax.browse --config=configs/x.py

Writes one HTML page that needs nothing else: the first training crops with their labels painted over, made by the run's own
loader and augmentation, beside the images and labels in the files; how often each class occurs; and what segjax.check_data
complains about. It reads both splits once.
"""

import base64
import io
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
from absl import flags

from segjax.config import IGNORE_LABEL, ConfigError
from segjax.files import atomic
from segjax.input_pipeline import DataError, images
from segjax.run import commandline

_OUT = commandline.define_path("out", "browse.html", "The page to write.")
_SAMPLES = flags.DEFINE_integer("samples", 24, "How many training examples it shows.", lower_bound=1)
_LARGEST = 720  # Pixels of the longer side of a picture; larger ones are shrunk.
_MOST_COMPLAINTS = 100


class Sample(NamedTuple):
  """One training example, as a step sees it.

  Attributes:
    step, row: its place, the step from 1 as in a run's lines, the row of the global batch from 0.
    index: of the example in its source.
    readable: whether its files could be read; it is all void otherwise.
    image: [h + 2 margin, w + 2 margin, 3] float32 in [0, 255]. label: [h, w] int32.
  """

  step: int
  row: int
  index: int
  readable: bool
  image: np.ndarray
  label: np.ndarray


def samples(experiment, count: int) -> list[Sample]:
  """The first `count` training examples of a run in their order.

  Raises:
    ConfigError, DataError: what would stop the run before its first step.
  """
  import jax

  from segjax import sharding, steps
  from segjax.input_pipeline.bad_examples import BadExamples

  config, found = experiment.config, []
  augmented = jax.jit(sharding.on(experiment.mesh)(experiment.augment_batch))
  num_steps, rows = -(-count // config.batch_size), np.arange(config.batch_size)
  with tempfile.TemporaryDirectory() as folder:
    bad = BadExamples(folder, len(experiment.train_source))
    for step, batch in enumerate(experiment.train_batches(0, num_steps, rows=rows, bad=bad)):
      crops = jax.device_get(augmented(steps.keys_of(config.seed, step)[0], batch)[:2])
      for row, (index, image, label) in enumerate(zip(batch["id"].tolist(), *crops)):
        found.append(Sample(step + 1, row, index, (step, row) not in bad, image, label))
  return found[:count]


class _Picture(NamedTuple):
  uri: str
  small: bool  # Whether single pixels are to be seen.


def _picture(pixels: np.ndarray) -> _Picture:
  """[H, W, 3] in [0, 255] as a JPEG in a data URI, shrunk where large."""
  from PIL import Image

  image = Image.fromarray(np.round(pixels).astype(np.uint8))
  image.thumbnail((_LARGEST, _LARGEST))
  file = io.BytesIO()
  image.save(file, "JPEG", quality=90, subsampling=0)
  return _Picture(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", max(image.size) < 200)


def _painted(image: np.ndarray, label: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """`image` with the label of its middle painted over."""
  from segjax.run import pictures

  out = np.round(image).astype(np.uint8)
  margin = (image.shape[0] - label.shape[0]) // 2
  inner = np.s_[margin : margin + label.shape[0], margin : margin + label.shape[1]]
  out[inner] = pictures.paint(out[inner], label.astype(np.uint8), palette)
  return out


def _shown(sample: Sample, source) -> dict:
  """What the page has of a sample."""
  shown = dict(name=source.describe(sample.index), step=sample.step, row=sample.row, raw=None)
  shown["crop"] = _picture(sample.image), _picture(_painted(sample.image, sample.label, source.palette))
  if sample.readable:
    image, label = source[sample.index]
    shown["raw"] = _picture(image), _picture(_painted(image, label, source.palette))
    shown["size"] = "{} x {}".format(*label.shape)
  return shown


def _complaint(split: str, source, index: int | None, text: str) -> dict:
  """What the page has of a problem; with the image, where that at least can be read."""
  complaint = dict(split=split, text=text, name=None, picture=None)
  if index is not None:
    complaint["name"] = source.describe(index)
    files = source.files()["image"]
    try:
      complaint["picture"] = _picture(images.read_image(files[index], exif="ignore")) if files else None
    except DataError:
      pass  # The text says what is wrong with it.
  return complaint


def _class_rows(splits: dict, source, shown: list[Sample]) -> list[dict]:
  """A row of the table for each class, and one for void: its share of the pixels of each split, and of the crops."""
  from segjax.run import pictures

  colors = pictures.color_table(source.palette)
  crops = sum((np.bincount(sample.label.ravel(), minlength=256) for sample in shown), np.zeros(256, int))
  shares = {name: found.counts.sum(0) / max(found.counts.sum(), 1) for name, found in splits.items()}
  largest = max((share.max() for share in list(shares.values())[:1]), default=1)
  rows = []
  for number, name in [*enumerate(source.classes), (IGNORE_LABEL, "void")]:
    of_splits = [
      (f"{100 * shares[split][number]:.2f} %", int((found.counts[:, number] > 0).sum()))
      for split, found in splits.items()
    ]
    width = 100 * next(iter(shares.values()))[number] / max(largest, 1e-9) if shares else 0
    color = "rgb({}, {}, {})".format(*colors[number])
    crop_share = f"{100 * crops[number] / max(crops.sum(), 1):.2f} %"
    rows.append(dict(name=name, color=color, splits=of_splits, crops=crop_share, width=round(float(width), 2)))
  return rows


def page(config, count: int) -> tuple[str, int]:
  """The page of `count` samples, and the number of problems that it names.

  Raises:
    DataError, ConfigError: the training split cannot be opened at all.
  """
  import jax
  import jinja2

  from segjax import sharding
  from segjax.experiment import Experiment
  from segjax.tools import check_data

  experiment = Experiment(config, mesh=sharding.make_mesh(1, 1, devices=jax.devices()[:1]))
  source = experiment.train_source
  found = check_data.examine(config)
  shown, failure = [], ""
  try:
    shown = samples(experiment, count)
  except (ConfigError, DataError) as error:
    failure = str(error)
  whole = {name: split for name, split in found.splits.items() if split.source is not None}
  listed = [(name, split.source, *problem) for name, split in found.splits.items() for problem in split.problems]
  listed += [("both splits", None, None, problem) for problem in found.others]
  template = pathlib.Path(__file__).with_suffix(".html.jinja").read_text(encoding="utf-8")
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  text = environment.from_string(template).render(
    title=f"Training data of {config.data.dir or config.data.name}",
    summary=f"{', '.join(f'{len(split.source):,} images in {name}' for name, split in whole.items())};"
    f" {len(source.classes)} classes; crops of {config.crop_size[0]} x {config.crop_size[1]} (height x width),"
    f" {config.batch_size} to a step.",
    splits=list(whole),
    classes=_class_rows(whole, source, shown),
    complaints=[_complaint(*problem) for problem in listed[:_MOST_COMPLAINTS]],
    left_out=max(len(listed) - _MOST_COMPLAINTS, 0),
    notes=found.notes,
    failure=failure,
    samples=[_shown(sample, source) for sample in shown],
  )
  return text, len(listed) + bool(failure)


def browse(config, out: pathlib.Path, count: int) -> int:
  """Writes `page` and says what it holds; returns the number of problems.

  Raises:
    ConfigError: the page cannot be written there.
  """
  if not out.parent.is_dir():
    raise ConfigError(f"--out={out}: no folder {out.parent}. Make it, or name another.")
  text, problems = page(config, count)
  try:
    atomic.write_text(out, text)
  except OSError as error:
    raise ConfigError(f"--out={out} cannot be written ({error}). Name another file.") from error
  found = f"{problems} problem(s) found, see there" if problems else "no problems found"
  print(f"{out}: {len(text.encode()) / 1e6:.1f} MB; {found}")
  return problems


def main(argv: list[str]) -> None:
  """The command line."""
  del argv
  with commandline.readable_errors():
    config = commandline.config()
    commandline.enable_float64(config)
    browse(config, pathlib.Path(_OUT.value), _SAMPLES.value)


if __name__ == "__main__":
  commandline.run(main)
