"""Images from anywhere, without labels: found, named, and laid on canvases, large ones in overlapping tiles.

The canvas matters: the padding around an image changes a network's output near the image's border, and the grid of its
feature maps. So an image's canvas follows from its own size alone, never from the other images (`canvas_for`).
"""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import images, inventory, rasters
from segjax.input_pipeline.images import DataError

ROUNDING = 64  # Pixels between canvases of images that have their own, so that few programs are compiled.
MARGIN = 128  # Pixels of a tile at each inner side that only give context. A U-Net of depth 4 sees at most 108.


@dataclasses.dataclass(frozen=True)
class Photo:
  """An image file.

  Attributes:
    name: of what is made from it, without extension; with subfolders, "a/b".
    size: (h, w), pixels.
  """

  path: pathlib.Path
  name: str
  size: tuple[int, int]


def find_photos(
  inputs: Sequence[str], outputs: Sequence[pathlib.Path], exif: str, pixels: images.Pixels = images.RGB
) -> tuple[list[Photo], list[str]]:
  """The images that `inputs` name, and what cannot be used, one line each. Reads headers only.

  Args:
    inputs: files, whatever their extension, and folders, searched with their subfolders for images. A file that several
      of them name counts once.
    exif: how to treat EXIF's orientation; see `images.Reading`.
    pixels: what the images hold.
    outputs: folders that results go to: no search enters them, so that results of an earlier call are no inputs.

  Raises:
    DataError: a folder without images, or two images of one name.
  """
  outputs, reading = {_real(folder) for folder in outputs}, _reading(exif, pixels)
  named, problems = {}, []  # {real path: (path, name)}
  for given in map(pathlib.Path, inputs):
    found = {given: given.name}
    if os.path.isdir(given):  # Not Path.is_dir(), which raises for names that are too long.
      paths, others = inventory.search(given)
      found = {path: path.relative_to(given) for path in paths if not outputs & set(_real(path).parents)}
      if not found:
        extensions = ", ".join(inventory.EXTENSIONS)
        raise DataError(f"{given}: no images in this folder or below it ({extensions}). Check the path.")
      problems += [
        f"{images.printable(str(path))}: {why}" for path, why in inventory.without(others, found).items() if why.remedy
      ]
    for path, name in found.items():
      named.setdefault(_real(path), (path, pathlib.PurePath(name).with_suffix("").as_posix()))
  firsts = {}
  for path, name in named.values():
    if name in firsts:
      raise DataError(
        f"{firsts[name]} and {path} would both be written as {name}.png. Rename one, or predict them one after the other"
        " with another --out."
      )
    firsts[name] = path

  def read_header(item):
    path, name = item
    try:
      if not os.path.exists(path):
        raise DataError(f"{path}: no such file or folder.")
      header = rasters.read_header(path, reading) if reading.channels else images.read_header(path)
      return Photo(path, name, header.size_by(reading.exif))
    except DataError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    seen = list(pool.map(read_header, named.values()))
  return [s for s in seen if isinstance(s, Photo)], problems + [s for s in seen if isinstance(s, str)]


def _reading(exif: str, pixels: images.Pixels) -> images.Reading:
  return images.Reading(exif, channels=pixels.channels, depth=pixels.depth)


def _real(path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(os.path.realpath(path))  # Path.resolve() raises for links in a circle.


def read_ahead(
  photos: Sequence[Photo], workers: int, exif: str, pixels: images.Pixels = images.RGB
) -> Iterator[tuple[Photo, np.ndarray | DataError]]:
  """Each photo with its pixels [h, w, C], or what is wrong with it; the next `workers` are being read meanwhile.

  `exif`, `pixels`: see `find_photos`.
  """
  reading = _reading(exif, pixels)

  def read(photo):
    try:
      image = rasters.read(photo.path, reading)
    except DataError as error:
      return error
    if image.shape[:2] != photo.size:
      return DataError(f"{photo.path} was replaced by an image of another size. Predict it again.")
    return image

  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending = collections.deque()
    for photo in photos:
      pending.append((photo, pool.submit(read, photo)))
      if len(pending) > workers:
        first, future = pending.popleft()
        yield first, future.result()
    for first, future in pending:
      yield first, future.result()


def canvas_for(size: tuple[int, int], known: tuple[int, int] | None, tile: int) -> tuple[int, int]:
  """(H, W) of the canvas that an image is predicted on; smaller than the image where it takes tiles.

  1. An image that fits the evaluation's canvas lies there, as in evaluation.
  2. Others lie on one of their own: each side rounded up to 64 k + 1 pixels (a multiple of every stride, and 1, is the
     size at which resizing with aligned corners meets the feature map's grid),
  3. but no longer than `tile`, or than the evaluation's canvas, whichever is longer.

  Args:
    size: (h, w) of the image.
    known: the evaluation's canvas, None where it is not known.
    tile: pixels.
  """
  if known and all(n <= m for n, m in zip(size, known)):
    return known
  limits = tuple(max(tile, m) for m in known or (0, 0))
  return tuple(min(-(-(n - 1) // ROUNDING) * ROUNDING + 1, limit) for n, limit in zip(size, limits))


@dataclasses.dataclass(frozen=True)
class Part:
  """Pixels [start, stop) of one axis that are predicted together, of which [keep_start, keep_stop) are kept."""

  start: int
  stop: int
  keep_start: int
  keep_stop: int


def axis_parts(size: int, canvas: int, stride: int, model_margin: int = 0) -> list[Part]:
  """Tiles along one axis: each pixel is kept once, from a tile that shows what is around it.

  Args:
    size: of the image. canvas: of a tile; one that holds the image is the only one.
    stride: of the model. Tiles begin at multiples of it, so that poolings combine the same pixels in each.
    model_margin: pixels around it that a logit of an unpadded model sees.
  """
  if size <= canvas:
    return [Part(0, size, 0, size)]
  margin = min(max(MARGIN, model_margin), canvas // 4)
  step = max((canvas - 2 * margin) // stride, 1) * stride
  starts = [n * step for n in range(-(-(size - canvas) // step) + 1)]
  cuts = [0, *(start + margin for start in starts[1:]), size]
  return [Part(start, min(start + canvas, size), *cuts[n : n + 2]) for n, start in enumerate(starts)]


def example(pixels: np.ndarray, index: int) -> dict[str, np.ndarray]:
  """An image as `load_example` gives a source's, with a label that is all void."""
  size = pixels.shape[:2]
  label = np.full(size, IGNORE_LABEL, np.uint8)
  return dict(image=pixels, label=label, size=np.array(size, np.int32), id=np.array(index, np.int32))
