"""COCO's JSON of instances (polygons and RLE; cocodataset.org/#format-data) to masks of classes.

1. Classes: what no instance covers is class 0, "background"; the categories follow in the order of their ids. A category
   called "background" is class 0. (An `out`/classes.txt that is there already decides instead, by the names.)
2. Overlaps: the instance with fewer pixels is on top; of two with as many, the later one in the file.
3. Crowds (iscrowd) are void, but for the instances in them.
4. Images without annotations are all background, as in COCO's own evaluation.
"""

import functools
import pathlib
import types
from collections.abc import Sequence

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import images
from segjax.input_pipeline.images import DataError
from segjax.tools import mask_tree
from segjax.tools.mask_tree import Annotated


def prepare(annotations: pathlib.Path, folder: pathlib.Path, out: pathlib.Path, split: str, clip: bool) -> None:
  """Makes images, masks and classes.txt of a JSON file, see the module and `mask_tree.write`.

  Args:
    annotations: the JSON file.
    folder: of the images, to which the file's names are relative.
    out, split: see `mask_tree.write`.
    clip: whether polygons are cut off at the image's border, instead of refused.

  Raises:
    DataError: pycocotools is missing, or annotations or images that cannot be used, each with its remedy.
  """
  coco = _library()
  if annotations.is_dir():
    raise DataError(f"{annotations} is a folder. Name one JSON file of instances, as instances_train2017.json.")
  content = mask_tree.read_json(annotations)
  try:
    categories = {category["id"]: str(category["name"]).strip() for category in content["categories"]}
    records = {image["id"]: image for image in content["images"]}
    named = {key: (str(r["file_name"]), (int(r["height"]), int(r["width"]))) for key, r in records.items()}
    found = [
      (a["id"] if "id" in a else n, a["image_id"], a["category_id"], a) for n, a in enumerate(content["annotations"])
    ]
    names = [categories[key] for key in sorted(categories)]
    hash(tuple(row[1:3] for row in found))  # TypeError where an id is a list.
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise DataError(
      f"{annotations}: no COCO annotations of instances ({type(error).__name__}: {error}). It needs images (id, file_name,"
      " height, width), categories (id, name) and annotations (image_id, category_id, segmentation)."
    ) from error
  for what, count, entries in (
    ("images", len(records), content["images"]),
    ("categories", len(categories), content["categories"]),
    ("names of categories", len(set(names)), names),
  ):
    if count < len(entries):
      raise DataError(
        f"{annotations}: {len(entries)} {what}, of which {len(entries) - count} repeat. Make them differ."
      )
  if not records or not names:
    raise DataError(f"{annotations}: no {'images' if names else 'categories'}. Export the annotations again.")
  classes, numbers = mask_tree.class_numbers(out, names)
  instances = {key: [] for key in records}
  for name, image, category, annotation in found:
    if image not in records or category not in categories:
      raise DataError(
        f"{annotations}: annotation {name} names image {image} and category {category}, and the file lacks"
        f" {'the category' if image in records else 'the image'}. Remove the annotation, or add what it names."
      )
    instances[image].append((name, numbers[categories[category]], annotation))
  examples = [
    Annotated(
      file_name,
      folder / file_name,
      size,
      functools.partial(_draw, coco, f"{annotations}: {file_name}", instances[key], clip),
      f"{annotations}: image {key}",
    )
    for key, (file_name, size) in named.items()
  ]
  mask_tree.write(out, split, examples, classes)
  mask_tree.say_unused(folder, examples)
  _report(out, instances, classes, numbers, names)


def _report(out, instances, classes, numbers, names) -> None:
  used = {number for shapes in instances.values() for _, number, _ in shapes}
  if idle := [name for name in names if numbers[name] not in used]:
    print(f"note: {len(idle)} categories without annotations: {images.listed(idle)}")
  if empty := sum(not shapes for shapes in instances.values()):
    print(f"note: {empty} images without annotations, which are all {classes[0]}")
  crowds = sum(bool(a["iscrowd"]) for shapes in instances.values() for *_, a in shapes if "iscrowd" in a)
  total = sum(map(len, instances.values()))
  print(f"{out}: {len(instances)} images, {total} instances ({crowds} crowds, void), {len(classes)} classes")


def _library() -> types.ModuleType:
  try:
    from pycocotools import mask
  except ImportError as error:
    raise DataError(f"COCO's masks need pycocotools ({error}). Install it: pip install 'segjax[coco]'.") from error
  return mask


def _draw(coco, file: str, instances: Sequence[tuple], clip: bool, size: tuple[int, int]) -> np.ndarray:
  """[H, W] uint8 of (annotation's name, class, annotation), by the rules of the module."""
  layers = []
  for name, number, annotation in instances:
    shape = _encoded(coco, f"{file}: annotation {name}", annotation, clip, size)
    crowd = "iscrowd" in annotation and bool(annotation["iscrowd"])
    layers.append((not crowd, -int(coco.area(shape)), IGNORE_LABEL if crowd else number, shape))
  label = np.zeros(size, np.uint8)
  for *_, number, shape in sorted(layers, key=lambda layer: layer[:2]):  # Stable: of two alike the later is on top.
    label[coco.decode(shape).astype(bool)] = number
  return label


def _encoded(coco, what: str, annotation: dict, clip: bool, size: tuple[int, int]) -> dict:
  """An annotation's mask in pycocotools' run lengths, which are small, however many instances an image has.

  Raises:
    DataError: no mask, polygons outside of the image, or RLE of another size.
  """
  shape = annotation["segmentation"] if "segmentation" in annotation else None
  if isinstance(shape, dict) and {"counts", "size"} <= shape.keys():
    counts = _run_lengths(shape["counts"]) if isinstance(shape["counts"], str) else shape["counts"]
    sound = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    if not sound or list(shape["size"]) != list(size) or sum(counts) != size[0] * size[1]:
      raise DataError(
        f"{what}: its RLE is of size {shape['size']} or damaged, the image has {list(size)} (height, width). Export it again."
      )
    return coco.frPyObjects(dict(counts=counts, size=list(size)), *size)
  if not isinstance(shape, list) or not shape:
    raise DataError(f"{what} has no segmentation, and a box is no mask. Add a polygon or RLE, or remove it.")
  for polygon in shape:
    try:
      points = np.array(polygon, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
      points = np.zeros((0, 2))
    if len(points) < 3:  # pycocotools takes four numbers for a box.
      raise DataError(f"{what}: a polygon needs x and y of three points or more. Annotate it again, or remove it.")
    mask_tree.check_inside(points, size, f"{what}: a polygon", clip)
  return coco.merge(coco.frPyObjects([[float(n) for n in polygon] for polygon in shape], *size))


def _run_lengths(text: str) -> list[int]:
  """Of COCO's compressed RLE (cocoapi, rleFrString); pycocotools decodes some damaged ones to whatever memory holds."""
  counts, value, shift = [], 0, 0
  for code in text.encode():
    value |= (code - 48 & 31) << shift
    shift += 5
    if code - 48 & 32:
      continue
    if code - 48 & 16:
      value -= 1 << shift
    counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    value, shift = 0, 0
  return counts
