"""LabelMe's JSON files, one beside each image (github.com/wkentaro/labelme), to masks of classes.

1. Classes: what no shape covers is class 0, "background", and so is the label `_background_`; the others follow in
   alphabetical order. (An `out`/classes.txt that is there already decides instead.) The label `__ignore__` is void.
2. Shapes are drawn as LabelMe draws them, in the file's order: of two that overlap, the later one is on top.
3. The image is the one that `imagePath` names; where that file is missing, the one inside the JSON (`imageData`).
"""

import base64
import functools
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import images, masks
from segjax.input_pipeline.images import DataError
from segjax.tools import mask_tree
from segjax.tools.mask_tree import Annotated

_LEAST_POINTS = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}
_IGNORE, _BACKGROUND = "__ignore__", "_background_"  # LabelMe's names.


def prepare(annotations: pathlib.Path, folder: pathlib.Path | None, out: pathlib.Path, split: str, clip: bool) -> None:
  """Makes images, masks and classes.txt of LabelMe's files, see the module and `mask_tree.write`.

  Args:
    annotations: the folder of the JSON files, searched with its subfolders.
    folder: of the images, laid out as `annotations`; None: where the files say.
    out, split: see `mask_tree.write`.
    clip: whether shapes are cut off at the image's border, instead of refused.

  Raises:
    DataError: annotations or images that cannot be used, each with its remedy.
  """
  paths = sorted(annotations.rglob("*.json")) if annotations.is_dir() else []
  if not paths:
    raise DataError(f"{annotations}: no folder of LabelMe's JSON files. Name the folder where they lie.")
  problems, read = [], []
  for path in paths:
    try:
      read.append((path, *_read(path)))
    except DataError as error:
      problems.append(str(error))
  mask_tree.raise_all(problems, len(paths))
  labels = {label for _, _, shapes in read for label, *_ in shapes}
  classes, numbers = mask_tree.class_numbers(out, sorted(labels - {_IGNORE, _BACKGROUND}))
  numbers |= {_IGNORE: IGNORE_LABEL, _BACKGROUND: 0}
  examples = []
  for path, content, shapes in read:
    image, suffix, size = _image(path, content, annotations, folder)
    name = path.relative_to(annotations).with_suffix(suffix).as_posix()
    draw = functools.partial(_draw, path, shapes, numbers, clip)
    examples.append(Annotated(name, image, size, draw, str(path)))
  mask_tree.write(out, split, examples, classes)
  mask_tree.say_unused(folder or annotations, examples)
  empty = sum(not shapes for *_, shapes in read)
  if empty:
    print(f"note: {empty} images without shapes, which are all {classes[0]}")
  print(f"{out}: {len(read)} images, {sum(len(s) for *_, s in read)} shapes, {len(classes)} classes")


def _read(path: pathlib.Path) -> tuple[dict, list[tuple]]:
  """A file's content, and (label, kind, points [N, 2], shape) of each of its shapes."""
  content, shapes = mask_tree.read_json(path), []
  if not isinstance(content, dict) or not isinstance(content["shapes"] if "shapes" in content else None, list):
    raise DataError(f"{path}: no file of LabelMe, it has no list `shapes`. Move it away, or export it again.")
  for number, shape in enumerate(content["shapes"], start=1):
    what = f"{path}: shape {number}"
    try:
      kind = str((shape["shape_type"] if "shape_type" in shape else None) or "polygon")  # Old files name none.
      label, points = shape["label"].strip(), np.array(shape["points"], np.float64).reshape(-1, 2)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
      raise DataError(f"{what} has no label or points ({error!r}). Annotate it again, or remove it.") from error
    if kind not in _LEAST_POINTS:
      raise DataError(
        f"{what} ({label!r}) is a {kind}, which has no area. Known: {', '.join(_LEAST_POINTS)}. Draw it as a polygon, or"
        " remove it."
      )
    if len(points) < _LEAST_POINTS[kind]:
      raise DataError(f"{what} ({label!r}): a {kind} of {len(points)} points. Annotate it again, or remove it.")
    shapes.append((label, kind, points, shape))
  return content, shapes


def _image(path: pathlib.Path, content: Mapping, root: pathlib.Path, folder: pathlib.Path | None):
  """An image's file or content, its ending and its (H, W), if the file says that."""
  name = content["imagePath"] if "imagePath" in content else None
  name = str(name or path.with_suffix("").name).replace("\\", "/")  # Of Windows.
  image = path.parent / name
  if folder:
    image = folder / path.relative_to(root).parent / pathlib.PurePosixPath(name).name
  suffix, data = pathlib.PurePosixPath(name).suffix, content["imageData"] if "imageData" in content else None
  if not os.path.isfile(image) and data:
    try:
      image = base64.b64decode(data)
    except (TypeError, ValueError) as error:
      raise DataError(f"{path}: its imageData is damaged ({error}). Put {name} beside it.") from error
    with images.opened(f"{path} (imageData)", io.BytesIO(image), "no readable image") as picture:
      suffix = "." + picture.format.lower()
      suffix = {".jpeg": ".jpg", ".mpo": ".jpg"}[suffix] if suffix in (".jpeg", ".mpo") else suffix
  size = tuple(content[key] if key in content else None for key in ("imageHeight", "imageWidth"))
  return image, suffix or ".png", size if all(isinstance(n, int) for n in size) else None


def _draw(
  path: pathlib.Path, shapes: Sequence[tuple], numbers: Mapping, clip: bool, size: tuple[int, int]
) -> np.ndarray:
  """[H, W] uint8 of what `_read` gives, as LabelMe's `shape_to_mask` draws it."""
  picture = Image.new("L", size[::-1], 0)
  draw = ImageDraw.Draw(picture)
  for number, (label, kind, points, shape) in enumerate(shapes, start=1):
    what, value = f"{path}: shape {number} ({label!r})", numbers[label]
    mask_tree.check_inside(points, size, what, clip)
    (x, y), (right, below) = points[0], points[1]
    if kind == "circle":  # The centre, and a point of the rim.
      radius = math.hypot(right - x, below - y)
      draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=value, fill=value)
    elif kind == "rectangle":
      draw.rectangle([*points.min(0), *points.max(0)], outline=value, fill=value)
    elif kind == "mask":
      picture.paste(value, (int(x), int(y)), Image.fromarray(_bitmap(what, shape, points)))
    else:
      draw.polygon([tuple(point) for point in points], outline=value, fill=value)
  return np.asarray(picture)


def _bitmap(what: str, shape: Mapping, points: np.ndarray) -> np.ndarray:
  """[h, w] bool of a shape that is a PNG between two corners, both inside."""
  try:
    content = base64.b64decode(shape["mask"])
  except (KeyError, TypeError, ValueError) as error:
    raise DataError(f"{what} has no readable `mask` ({error!r}). Annotate it again, or remove it.") from error
  bitmap = masks.read_mask(what, io.BytesIO(content))
  (x1, y1), (x2, y2) = points[:2].astype(int)
  if bitmap.shape != (y2 - y1 + 1, x2 - x1 + 1):
    raise DataError(f"{what}: its mask is {bitmap.shape}, but its corners are {points.tolist()}. Annotate it again.")
  return bitmap > 0
