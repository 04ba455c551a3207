"""Annotations of images to a tree of images and masks, as `sources.folder` reads it: written whole, or not at all."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import tqdm
from PIL import Image

from segjax.config import IGNORE_LABEL
from segjax.files import atomic
from segjax.input_pipeline import images, inventory
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets
from segjax.tools import unpacking

CLASSES_FILE = "classes.txt"
BACKGROUND = "background"  # Class 0, what no shape covers, where `CLASSES_FILE` does not say otherwise.
_FAR = 10  # Times an image's longer side, from which on coordinates are a mistake, whose drawing may take for ever.
_SLACK = 1.0  # Pixels that a point may lie outside of its image: annotation tools round.


@dataclasses.dataclass(frozen=True)
class Annotated:
  """An image with its annotations.

  Attributes:
    name: of the image in the tree, with its ending; with subfolders, "a/b.jpg".
    image: its file, or the content.
    size: (H, W) that the annotations say it has; None where they do not.
    draw: (H, W) -> [H, W] uint8 class ids, 255 for void. Raises DataError.
    origin: the annotations' file, for messages.
  """

  name: str
  image: pathlib.Path | bytes
  size: tuple[int, int] | None
  draw: Callable[[tuple[int, int]], np.ndarray]
  origin: str


def read_json(path: pathlib.Path):
  """What a JSON file holds.

  Raises:
    DataError: it is missing, or no JSON in UTF-8.
  """
  try:
    images.check_regular(path)
    return json.loads(path.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError, RecursionError) as error:
    raise DataError(f"{path}: not readable as JSON ({error}). Restore it, or export the annotations again.") from error


def class_numbers(out: pathlib.Path, names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, int]]:
  """The classes of the tree, and the class number of each of `names`.

  The lines of `out`/classes.txt where it is there: by another split's call, or by hand, to choose the order. Else
  "background" and `names`.

  Raises:
    DataError: a name that cannot be a line, that classes.txt lacks, or too many.
  """
  names = list(dict.fromkeys(names))
  path = out / CLASSES_FILE
  classes = tuple(images.read_lines(path)) if path.is_file() else (BACKGROUND, *(n for n in names if n != BACKGROUND))
  if odd := [name for name in names if not name or name != images.printable(name.strip())]:
    raise DataError(
      f"{odd[0]!r} cannot be the name of a class. Give it letters, no line ends, and no spaces around them."
    )
  if unknown := [name for name in names if name not in classes]:
    raise DataError(
      f"{path} names other classes than the annotations: it lacks {images.listed(unknown)}. Correct the annotations, add"
      " lines at its end, or give another --out."
    )
  if not 2 <= len(classes) < IGNORE_LABEL or len(set(classes)) < len(classes):
    raise DataError(f"{images.listed(classes)}: {len(classes)} classes. 2 to 254 different ones are possible.")
  return classes, {name: number for number, name in enumerate(classes)}


def check_inside(points: np.ndarray, size: tuple[int, int], what: str, clip: bool) -> None:
  """Raises DataError where points [N, 2] (x, y) lie outside of an image of `size` (H, W), unless `clip`, or are no numbers."""
  if not (np.abs(points) <= _FAR * max(size)).all():  # Nor NaN.
    raise DataError(
      f"{what} has coordinates that are no numbers, or far from the image of {size[0]}x{size[1]}. Annotate it again, or remove it."
    )
  low, high = points.min(0), points.max(0)
  if not clip and ((low < -_SLACK).any() or (high > np.array(size[::-1]) + _SLACK).any()):
    raise DataError(
      f"{what} reaches from ({low[0]:g}, {low[1]:g}) to ({high[0]:g}, {high[1]:g}), outside of an image of width {size[1]}"
      f" and height {size[0]}. If the image was resized, annotate the present one; to cut shapes off at the border, pass --clip."
    )


def write(out: pathlib.Path, split: str, examples: Sequence[Annotated], classes: tuple[str, ...]) -> None:
  """Writes `out`/images/`split`, `out`/masks/`split` (PNG with VOC's colours) and classes.txt.

  All is drawn into a folder beside them, which takes their place at the end: what is stopped or fails leaves nothing.
  Images are linked (hard) where the disk allows it, else copied.

  Raises:
    DataError: the split is there already; all images that cannot be used, each with its remedy; or `out` cannot be written.
  """
  places = {folder: out / folder / split for folder in ("images", "masks")}
  for place in places.values():
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
      raise DataError(f"{place} is there already. Remove it to make it again, or give another --out or --split.")
  raise_all(_clashes(examples), len(examples))
  sizes = _each(_size, examples, "images")
  with unpacking.writing(out):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out) as temporary:
      root = pathlib.Path(temporary)
      for folder in places:
        (root / folder).mkdir()
      _each(functools.partial(_write_pair, root), list(zip(examples, sizes)), "masks")
      for folder, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        (root / folder).replace(place)  # An empty folder is replaced.
    path = out / CLASSES_FILE
    if not path.is_file():
      atomic.write_text(path, "".join(name + "\n" for name in classes))


def say_unused(folder: pathlib.Path, examples: Sequence[Annotated]) -> None:
  """Prints how many images of a folder have no annotations."""
  used = {os.path.realpath(example.image) for example in examples if isinstance(example.image, pathlib.Path)}
  others = [path.name for path in inventory.search(folder)[0] if os.path.realpath(path) not in used]
  if others:
    print(f"note: {folder} holds {len(others)} images that no annotations name, left out: {images.listed(others)}")


def _clashes(examples: Sequence[Annotated]) -> list[str]:
  """What is wrong with the names."""
  problems, firsts = [], {}
  for example in examples:
    name = pathlib.PurePosixPath(example.name)
    if name.is_absolute() or ".." in name.parts or not name.name or images.printable(example.name) != example.name:
      problems.append(
        f"{example.origin}: the image's name {example.name!r} leads elsewhere, or is no text. Make it relative."
      )
    elif (stem := name.with_suffix("")) in firsts:
      problems.append(
        f"{example.origin}: {firsts[stem]} and {example.name} would share the mask {stem}.png. Rename one of the two."
      )
    else:
      firsts[stem] = example.name
  return problems


def _size(example: Annotated) -> tuple[int, int]:
  """(H, W) that the mask gets: that of the annotations, if the image has it as stored or as EXIF turns it."""
  if isinstance(example.image, bytes):
    header = images.read_header(f"{example.origin} (imageData)", io.BytesIO(example.image))
  elif not os.path.isfile(example.image):  # Not Path.is_file(), which raises for names that are too long.
    raise DataError(
      f"{example.origin}: its image {example.image} is missing. Add it, remove its annotations, or correct --images."
    )
  else:
    header = images.read_header(example.image)
  size = example.size or header.size_by("refuse")
  if size not in (header.size, header.size_by("apply")):
    raise DataError(
      f"{example.origin} says that {header.path} is {size[0]}x{size[1]}, but it is {header.size[0]}x{header.size[1]} (height"
      " x width). Put back the image that was annotated."
    )
  return size


def _write_pair(root: pathlib.Path, pair: tuple[Annotated, tuple[int, int]]) -> None:
  example, size = pair
  label = example.draw(size)
  mask = (root / "masks" / example.name).with_suffix(".png")
  mask.parent.mkdir(parents=True, exist_ok=True)
  picture = Image.fromarray(label, mode="P")
  picture.putpalette(datasets.palette(256).reshape(-1).tolist())
  picture.save(mask)
  image = root / "images" / example.name
  image.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(example.image, bytes):
    image.write_bytes(example.image)
    return
  source = example.image.resolve()  # A link to a link would be to the name.
  with contextlib.suppress(OSError):
    os.link(source, image)
    return
  shutil.copyfile(source, image)


def _each(function: Callable, items: Sequence, title: str) -> list:
  """[function(item) for item in items], in threads; all DataErrors at once."""

  def attempt(item):
    try:
      return function(item), None
    except DataError as error:
      return None, str(error)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    done = list(tqdm.tqdm(pool.map(attempt, items), title, len(items), unit=" files"))
  raise_all([problem for _, problem in done if problem], len(items))
  return [result for result, _ in done]


def raise_all(problems: list[str], count: int) -> None:
  """Raises DataError with the first 20 of the `problems` of `count` images, if there are any."""
  if problems:
    shown = "\n  ".join(problems[:20])
    raise DataError(f"{len(problems)} of {count} annotated images cannot be used:\n  {shown}\nNothing was written.")
