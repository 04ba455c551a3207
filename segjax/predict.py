"""Predictions for any images: python -m segjax.predict --workdir=RUN IMAGES... --out=DIR [--config.eval.flip=True ...]

IMAGES are files, or folders, which are searched with their subfolders. For each image NAME, DIR gets these; files of the
same name that an earlier call left there are overwritten, but two images of one name are refused.

  ids/NAME.png          class ids as grey levels, in the order of ids/classes.txt
  colors/NAME.png       the same ids as a palette image, shown in the classes' colours
  overlays/NAME.png     the image, painted with them (of two classes: the second, in green)
  probability/NAME.png  for two classes: the second's probability, 0 to 255 for 0 to 1, as a palette image, shown from
                        black to white over blue, green and red

Images that EXIF wants turned are turned or not as in the run's evaluation split, if its masks' sizes told, or else by
--config.data.exif. Files that cannot be used are named at the end and the others predicted; the exit code then is 1.

Same as evaluation, bit for bit, for images that fit its canvas (config.data.canvas_size, or the first of the run's
evaluation split, which the workdir remembers): the same program gets the same canvas, in batches of as many. To
repeat the evaluation of another split, give its canvas: --config.data.canvas_size=H,W. An image that does not fit gets
a canvas of its own, its size rounded up to 64 k + 1 pixels, and a side longer than --tile (or than the evaluation's
canvas, where that is longer) is cut into tiles that overlap by 256 pixels, which bounds memory whatever the image's
size. `input_pipeline.unlabelled.canvas_for` has the rule. Programs are compiled per canvas, so at most once for each of few
sizes, not for each size.

Instead of a run, weights of other frameworks predict as in --mode=eval: --config=FILE --config.init.path=WEIGHTS
--config.init.scheme=NAME, without --workdir. No data set need be there, where the config names the classes.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from absl import flags
from PIL import Image

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.input_pipeline import DataError, images, order, unlabelled
from segjax.input_pipeline.canvas import pad_batch
from segjax.run import commandline, image_statistics, outputs, pictures, prediction_info

KINDS = ("ids", "colors", "overlays", "probability")
TILE = 1025  # Pixels. 64 channels of such a square, a U-Net's first features, are 0.27 GB.
AHEAD = 2**26  # Pixels of images that are read before their turn, so that few large ones are in memory at once.


def predict(
  config, workdir: pathlib.Path | None, inputs: Sequence[str], out: pathlib.Path, tile: int = TILE
) -> list[str]:
  """Predicts images into files; see above.

  Args:
    workdir: of a run; None, or one without a run, for the weights of `config.init`.
    inputs: files and folders.
    out: folder of the results, made if missing.
    tile: side of the largest square that is predicted at once, pixels, from 65 on.

  Returns:
    A line for each file that could not be used.

  Raises:
    ConfigError: no run, checkpoint or weights, or those of another model; `out` cannot be written; too little memory.
    DataError: a folder without images, no usable image at all, or two images of one name.
  """
  config = image_statistics.resolved(config, workdir, measure=False)
  exif, pixels = prediction_info.exif_rule(config, workdir), images.pixels_of(config.data)
  photos, problems = unlabelled.find_photos(inputs, [out / kind for kind in KINDS], exif, pixels)
  if not photos:
    raise DataError("\n  ".join(["None of the images can be used:", *problems]))
  _check_outputs(out, photos)

  # Not earlier: whoever misspelt a name should not wait for these imports.
  from segjax.experiment import Experiment
  from segjax.run import warm_start

  loaded = warm_start.load_unless_run(config, workdir)
  trained = prediction_info.of_run(config, workdir)
  experiment = Experiment(config, num_classes=len(trained.classes))
  variables, _, origin = experiment.trained_variables(workdir, loaded)
  save = _Pictures(out, trained.palette)

  workers = config.data.workers or os.cpu_count()
  groups = _groups(photos, experiment, trained.canvas_size, tile, workers)
  with (
    _named_failures(out),
    tqdm.tqdm(None, "predicting", len(photos), unit=" images") as bar,
    concurrent.futures.ThreadPoolExecutor(workers) as pool,
  ):
    (out / "ids").mkdir(exist_ok=True)
    (out / "ids/classes.txt").write_text("".join(f"{name}\n" for name in trained.classes))
    saving = collections.deque()
    for group in groups:
      before = len(problems)
      for result in _results(experiment, variables, group, exif, problems, tile):
        saving.append(pool.submit(save, *result))
        bar.update()
        if len(saving) > group.ahead:  # Results must not pile up in memory.
          saving.popleft().result()
      bar.update(len(problems) - before)
    for future in saving:
      future.result()
  written = KINDS if len(trained.classes) == 2 else KINDS[:3]
  protocol = f"scales {tuple(config.eval.scales)}, flip {config.eval.flip}"
  print(f"{origin}, {protocol}\nresults: {out}/{{{','.join(written)}}}", flush=True)
  return problems


class _Group(NamedTuple):
  """Photos that share a canvas (H, W), and so a compiled program."""

  canvas: tuple[int, int]
  photos: list[unlabelled.Photo]
  batch_size: int
  ahead: int  # Photos that are read before their turn, and results that wait to be written.


def _groups(photos, experiment, eval_canvas, tile: int, workers: int) -> list[_Group]:
  """All photos by canvas; ConfigError where the mesh does not divide a batch."""
  from segjax import sharding

  if eval_canvas is None:
    print("note: no evaluation's canvas is known, so each image gets one of its own; see --config.data.canvas_size")
  by_canvas = collections.defaultdict(list)
  for photo in photos:
    by_canvas[unlabelled.canvas_for(photo.size, eval_canvas, tile)].append(photo)
  groups = []
  for canvas, group in sorted(by_canvas.items()):
    batch_size = experiment.config.eval.batch_size if canvas == eval_canvas else experiment.mesh.shape["data"]
    sharding.check_batch(experiment.mesh, "eval.batch_size", batch_size)
    largest = max(h * w for h, w in (photo.size for photo in group))
    groups.append(_Group(canvas, group, batch_size, ahead=min(workers, AHEAD // largest + 1)))
  return groups


def _results(
  experiment, variables, group: _Group, exif: str, problems: list[str], tile: int
) -> Iterator[tuple[unlabelled.Photo, np.ndarray, dict]]:
  """The photos that can be read, with their pixels and what is predicted for them; `problems` gets the others.

  Raises:
    ConfigError: too little memory.
  """
  import jax

  from segjax.run import evaluation

  network, pixels = experiment.network, images.pixels_of(experiment.config.data)
  tiles = _Tiles(group.canvas, network.coarsest_stride, network.margin, problems)
  photos = unlabelled.read_ahead(group.photos, group.ahead, exif, pixels)
  batches = tiles.batches(photos, group.batch_size, np.zeros((0, 0, pixels.count), pixels.dtype))
  try:
    for index, result in evaluation.predictions(experiment.eval_step, variables, batches, experiment.mesh):
      if whole := tiles.join(index, result):
        yield whole
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise ConfigError(
      f"The device has too little memory for images of {group.canvas[0]}x{group.canvas[1]}, {group.batch_size} at a time."
      f" Lower --config.eval.batch_size or --tile ({tile}).\n{str(error).splitlines()[0]}"
    ) from error


@contextlib.contextmanager
def _named_failures(out: pathlib.Path) -> Iterator[None]:
  """What cannot be written becomes a ConfigError."""
  try:
    yield
  except OSError as error:
    raise ConfigError(f"{out} cannot be written ({error}). Free the space, or give another --out.") from error


class _Pictures:
  """Writes the result of an image, one picture of each kind.

  Args:
    out: folder of the results.
    palette: [K, 3] uint8, the classes' colours.
  """

  def __init__(self, out: pathlib.Path, palette: np.ndarray):
    self._out, self._palette = out, palette
    self._colors, self._heat = pictures.color_table(palette), pictures.heat_table()

  def __call__(self, photo: unlabelled.Photo, image: np.ndarray, result: dict[str, np.ndarray]) -> None:
    ids = result["prediction"]
    made = dict(ids=Image.fromarray(ids), colors=pictures.indexed_image(ids, self._colors))
    made["overlays"] = Image.fromarray(pictures.paint(pictures.visible(image), ids, self._palette))
    if "probability" in result:
      made["probability"] = pictures.indexed_image(result["probability"], self._heat)
    for kind, picture in made.items():
      path = outputs.output_path(self._out / kind, f"{photo.name}.png")
      path.parent.mkdir(parents=True, exist_ok=True)
      picture.save(path)


def _check_outputs(out: pathlib.Path, photos: Sequence[unlabelled.Photo]) -> None:
  """Raises ConfigError where `out` cannot be written, or a result would replace an image that is to be read; DataError
  where an image's name is too long for it."""
  outputs.check_outputs(out / max(KINDS, key=len), (f"{photo.name}.png" for photo in photos))
  read = {photo.path.resolve() for photo in photos}
  for photo in photos:
    for path in (out / kind / f"{photo.name}.png" for kind in KINDS):
      if path.resolve() in read:
        raise ConfigError(f"--out={out}: {path} is one of the images and would be overwritten. Give another --out.")
  try:
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
  except OSError as error:
    raise ConfigError(f"--out={out} cannot be written ({error}). Give another --out.") from error


class _Tiles:
  """Cuts images into tiles of one canvas, and joins what is predicted for them; an image that fits is one tile.

  Args:
    canvas: (H, W).
    stride, margin: of the model.
    problems: gets a line for each image that cannot be read.
  """

  def __init__(self, canvas: tuple[int, int], stride: int, margin: int, problems: list[str]):
    self._canvas, self._stride, self._margin, self._problems = canvas, stride, margin, problems
    self._under_way = {}  # {tile's id: (its image, row part, column part)}.

  def batches(
    self, images: Iterator[tuple[unlabelled.Photo, np.ndarray | DataError]], batch_size: int, blank: np.ndarray
  ) -> Iterator[dict]:
    """Batches as of `input_pipeline.eval_batches`, with the ids that `join` takes; filled up with `blank` [0, 0, C]."""
    tiles = self._cut(images)
    while examples := list(itertools.islice(tiles, batch_size)):
      filling = unlabelled.example(blank, order.PADDING)
      yield pad_batch(examples + [filling] * (batch_size - len(examples)), self._canvas)

  def _cut(self, images) -> Iterator[dict]:
    ids = itertools.count()
    for photo, image in images:
      if isinstance(image, DataError):
        self._problems.append(str(image))
        continue
      rows, cols = (
        unlabelled.axis_parts(n, m, self._stride, self._margin) for n, m in zip(image.shape[:2], self._canvas)
      )
      whole = _Whole(photo, image, len(rows) * len(cols))
      for row, col in itertools.product(rows, cols):
        index = next(ids)
        self._under_way[index] = whole, row, col
        yield unlabelled.example(image[row.start : row.stop, col.start : col.stop], index)

  def join(self, index: int, result: dict[str, np.ndarray]) -> tuple[unlabelled.Photo, np.ndarray, dict] | None:
    """Takes the result of a tile; returns the photo, its pixels and its whole result where this was its last tile.

    Args:
      result: {name: [h, w]} of the tile.
    """
    whole, row, col = self._under_way.pop(index)
    whole.left -= 1
    for name, values in result.items():
      if name not in whole.result:
        whole.result[name] = np.empty(whole.image.shape[:2], values.dtype)
      inner = values[row.keep_start - row.start :, col.keep_start - col.start :]
      target = whole.result[name][row.keep_start : row.keep_stop, col.keep_start : col.keep_stop]
      target[...] = inner[: target.shape[0], : target.shape[1]]
    return None if whole.left else (whole.photo, whole.image, whole.result)


@dataclasses.dataclass
class _Whole:
  """An image, of which `left` tiles are not yet predicted."""

  photo: unlabelled.Photo
  image: np.ndarray
  left: int
  result: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def _define_flags() -> None:
  # Not at import, where prepare's and main's flags of these names would be in the way.
  commandline.define_path("workdir", None, "Folder of the run that predicts.")
  commandline.define_path("out", None, "Folder of the results.")
  flags.DEFINE_integer(
    "tile",
    TILE,
    "Side of the largest square that is predicted at once, pixels; less takes less memory.",
    lower_bound=65,
  )
  flags.FLAGS.set_gnu_getopt(True)  # Images may stand between flags.


def main(argv: list[str]) -> None:
  """The command line."""
  args = flags.FLAGS
  with commandline.readable_errors():
    if len(argv) < 2:
      raise ConfigError("Name images, or folders of images.")
    if args.out is None:
      raise ConfigError("Name the folder of the results: --out=DIR.")
    config = commandline.config(data_dir=".")
    if args.workdir is None and not config.init.path:
      raise ConfigError("Name the --workdir of a run, or weights by --config.init.path.")
    workdir = None if args.workdir is None else pathlib.Path(args.workdir)
    commandline.enable_float64(config)
    commandline.keep_freed_memory()
    commandline.enable_compilation_cache()
    inputs = [config_lib.expand_home(path) for path in argv[1:]]
    problems = predict(config, workdir, inputs, pathlib.Path(args.out), args.tile)
  if problems:
    print(f"segjax: {len(problems)} file(s) skipped:\n  " + "\n  ".join(problems), file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
  _define_flags()
  commandline.run(main, positional=True)
