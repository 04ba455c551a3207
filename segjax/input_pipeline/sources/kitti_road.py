"""KITTI road, from the folder data_road as unzipped: where the car could drive, or the lane that it is on."""

import pathlib
import re

import numpy as np

from segjax.input_pipeline import images, inventory, mask_values
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets
from segjax.input_pipeline.sources.base import Files, Source, count_note, find_folder
from segjax.input_pipeline.sources.holdout import HoldOut

SPLITS = ("train", "val", "trainval", "test")
_COLOR_TABLE = {int(color, 16): label for color, label in datasets.KITTI_ROAD_MASK_COLORS.items()}
_IMAGE, _MASK = r"(um|umm|uu)_\d{6}\.png", r"(um|umm|uu)_(road|lane)_(\d{6})\.png"
_REMEDY = (
  "KITTI's masks hold FF0000 (background), FF00FF (road) and 000000 (void), and nothing between: restore the file from"
  " data_road.zip, and never resize masks with interpolation."
)


def to_label(path: str, mask: np.ndarray) -> np.ndarray:
  """A mask as stored, RGB, to [H, W] uint8: 0 background, 1 road, 255 other road or don't care.

  Raises:
    DataError: no RGB file, or other colours.
  """
  if mask.ndim == 2:
    raise DataError(f"{path}: not an RGB file. {_REMEDY}")
  return mask_values.map_colors(path, mask, _COLOR_TABLE, _REMEDY).astype(np.uint8)


def find_images(root: pathlib.Path, part: str) -> dict[str, pathlib.Path]:
  """Images of "training" or "testing" by name (um_000000), in the order of the names.

  Raises:
    DataError: there is none.
  """
  folder = root / part / "image_2"
  found = {path.stem: path for path in sorted(folder.glob("*.png")) if re.fullmatch(_IMAGE, path.name)}
  if not found:
    raise DataError(f"{folder} holds no um_*.png, umm_*.png or uu_*.png. Unzip data_road.zip again.")
  return found


def others(root: pathlib.Path, part: str) -> dict[pathlib.Path, inventory.Unused]:
  """What no split of "training" or "testing" can use."""
  images, found = inventory.search(root / part / "image_2", levels=0)
  found |= {path: inventory.MISNAMED for path in images if not re.fullmatch(_IMAGE, path.name)}
  if (folder := root / part / "gt_image_2").is_dir():
    masks, unknown = inventory.search(folder, levels=0)
    names = {path.name for path in images}
    found |= unknown
    for path in masks:
      if not (parts := re.fullmatch(_MASK, path.name)):
        found[path] = inventory.MISNAMED
      elif f"{parts[1]}_{parts[3]}.png" not in names:
        found[path] = inventory.NO_IMAGE
  return found


def mask_name(name: str, labels: str) -> str:
  """um_000000 -> um_road_000000.png."""
  category, number = name.split("_")
  return f"{category}_{labels}_{number}.png"


class KittiRoadSource(Source):
  """Random access to KITTI's road images, in the order of their names.

  Args:
    dir: data_road, or the folder above it.
    split: "train" and "val" share the training images, which have no official split: what `hold_out` chooses is "val".
      "trainval" is all of them, "test" the testing images (no public labels).
    labels: "road", or "lane", which the car is on: then only the images um_* count, as the others have no such masks.
    hold_out: how "val" is chosen.
    exif: see `images.Reading`.

  Raises:
    DataError: another split, a wrong root, or files that are missing, named.
  """

  def __init__(
    self, *, dir: str, split: str, labels: str = "road", hold_out: HoldOut = HoldOut(holdout=0.2), exif: str = "refuse"
  ):
    if split not in SPLITS:
      raise DataError(f"KITTI road has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    part = "testing" if split == "test" else "training"
    root = find_folder(dir, ("data_road",), holds="training/image_2", archive="data_road.zip")
    found = {name: path for name, path in find_images(root, part).items() if labels == "road" or name.startswith("um_")}
    masks = root / "training" / "gt_image_2"
    if split != "test":
      missing = [mask_name(name, labels) for name in found if not (masks / mask_name(name, labels)).is_file()]
      if missing:
        other = "lane" if labels == "road" else "road"
        others_there = all((masks / mask_name(name, other)).is_file() for name in found)
        hint = f" The masks of the {other} are there: data.labels={other}" if others_there else ""
        raise DataError(
          f"{masks}: {len(missing)} of {len(found)} masks are missing: {images.listed(missing)}. Unzip data_road.zip"
          f" again.{hint}"
        )
    categories = ("um",) if labels == "lane" else tuple(datasets.KITTI_ROAD_COUNTS)
    official = sum(datasets.KITTI_ROAD_COUNTS[category][split == "test"] for category in categories)
    notes = count_note(part, len(found), official)
    if split in ("train", "val"):
      held = hold_out.choose(list(found))
      found = {name: path for name, path in found.items() if (name in held) == (split == "val")}
    if not found:
      raise DataError(f"split {split!r} of {root} is empty. Hold out more images: data.holdout or data.folds.")
    super().__init__(
      Files(
        list(found),
        [(path, None if split == "test" else masks / mask_name(n, labels)) for n, path in found.items()],
        images.Reading(exif),
        lambda: others(root, part),
      ),
      *self.named_classes(labels=labels),
      to_label,
      labelled=split != "test",
      notes=notes,
    )

  @staticmethod
  def named_classes(*, labels, **_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `input_pipeline.named_classes`."""
    return ("background", labels), datasets.parse_colors(datasets.KITTI_ROAD_COLORS)
