"""Cityscapes, from its own folders or from TFDS's shards; label ids become the 19 training classes as they are read."""

import pathlib
import re

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import images, inventory, mask_values
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets
from segjax.input_pipeline.sources.base import Files, Source, count_note
from segjax.input_pipeline.sources.tfds_store import Records

CLASSES = tuple(name for name, _, _ in datasets.CITYSCAPES)
# The class of each id in 0 .. 255: void for the ids that the benchmark ignores, -1 for numbers that are not ids.
LABEL_MAP = dict.fromkeys(range(256), -1)
LABEL_MAP |= dict.fromkeys(range(datasets.CITYSCAPES_NUM_IDS), IGNORE_LABEL)
LABEL_MAP |= {label_id: train_id for train_id, (_, label_id, _) in enumerate(datasets.CITYSCAPES)}

IMAGES = "leftImg8bit"
IMAGE_SUFFIX = "_leftImg8bit.png"
_LABEL_FILES = r"(?:labelIds|labelTrainIds|instanceIds|instanceTrainIds|color)\.png|polygons\.json"
_ZIPS = {
  (IMAGES, "train_extra"): "leftImg8bit_trainextra.zip",
  (IMAGES, None): "leftImg8bit_trainvaltest.zip",
  ("gtFine", None): "gtFine_trainvaltest.zip",
  ("gtCoarse", None): "gtCoarse.zip",
}
_TFDS_SPLITS = {"train": "train", "val": "validation", "test": "test", "train_extra": "train_extra"}


def to_label(path: str, mask: np.ndarray) -> np.ndarray:
  """Label ids (0 to 33) to [H, W] uint8 training classes, 255 where the benchmark ignores the id.

  Raises:
    DataError: other values, so also a file of train ids, which must not be mapped a second time.
  """
  if mask.ndim == 3:
    raise DataError(f"{path}: a colour image. Take the file that ends in _labelIds.png.")
  remedy = "Cityscapes' label ids are 0 to 33: restore the file."
  if mask.size and mask.max() == IGNORE_LABEL:
    remedy = (
      "They look like train ids (255 = void) under the name of label ids, and mapping them again would garble them."
      " Restore the file of label ids from the zip."
    )
  return mask_values.map_labels(path, mask, LABEL_MAP, len(CLASSES), remedy)


def find_pairs(
  root: pathlib.Path, split: str, labels: str
) -> tuple[list[str], list[tuple[pathlib.Path, pathlib.Path | None]]]:
  """Names (city_sequence_frame) of a split, and their (image, mask) paths; mask None in `test`.

  Raises:
    DataError: a missing zip, city or file, named, or masks of train ids alone.
  """
  folder = _existing(root, IMAGES, split)
  found, _ = inventory.search(folder, levels=1)
  image_paths = {path.name.removesuffix(IMAGE_SUFFIX): path for path in found if _is_image(path, folder)}
  if not image_paths:
    raise DataError(
      f"{folder} holds no CITY/*{IMAGE_SUFFIX}, so the split is empty. Unzip {_zip(IMAGES, split)} again."
    )
  names = sorted(image_paths)
  if split == "test":
    return names, [(image_paths[name], None) for name in names]
  mask_folder = _existing(root, labels, split)
  masks = {path.name: path for path in inventory.search(mask_folder, levels=1)[0] if path.parent != mask_folder}
  suffix = f"_{labels}_labelIds.png"
  missing = [name for name in names if name + suffix not in masks]
  if missing:
    if f"{missing[0]}_{labels}_labelTrainIds.png" in masks:
      raise DataError(
        f"{mask_folder} holds _labelTrainIds.png but no _labelIds.png for {len(missing)} images. Only label ids are"
        f" read, and mapped here: unzip {_zip(labels, split)} again, no preparation script is needed."
      )
    cities = sorted({image_paths[name].parent.name for name in missing} - {path.parent.name for path in masks.values()})
    what = f"cities without labels: {', '.join(cities)}" if cities else f"{images.listed(missing)}"
    raise DataError(
      f"{mask_folder}: {len(missing)} of {len(names)} images have no *{suffix} ({what}). Unzip"
      f" {_zip(labels, split)} again."
    )
  return names, [(image_paths[name], masks[name + suffix]) for name in names]


def _is_image(path: pathlib.Path, folder: pathlib.Path) -> bool:
  return path.name.endswith(IMAGE_SUFFIX) and path.parent != folder


def others(root: pathlib.Path, split: str, labels: str) -> dict[pathlib.Path, inventory.Unused]:
  """What lies beside the split's files; its other label files belong to the zips, and nothing is wrong with them."""
  folder, mask_folder = root / IMAGES / split, root / labels / split
  photos, found = inventory.search(folder, levels=1)
  found |= dict.fromkeys(photos, inventory.MISNAMED)
  if not mask_folder.is_dir():
    return found
  names = {path.name.removesuffix(IMAGE_SUFFIX) for path in photos if _is_image(path, folder)}
  masks, unknown = inventory.search(mask_folder, levels=1)
  found |= unknown | dict.fromkeys(masks, inventory.MISNAMED)
  for path in (*masks, *unknown):
    if match := re.fullmatch(rf"([^.].*)_{labels}_({_LABEL_FILES})", path.name):
      if match[1] not in names and split != "test":
        found[path] = inventory.NO_IMAGE
      elif match[2] != "labelIds.png" or split == "test":  # A second one of the same name is not used.
        del found[path]
  return found


def _zip(kind: str, split: str) -> str:
  return _ZIPS[(kind, split)] if (kind, split) in _ZIPS else _ZIPS[(kind, None)]


def _existing(root: pathlib.Path, kind: str, split: str) -> pathlib.Path:
  if not (root / IMAGES).is_dir() and not (root / "gtFine").is_dir():
    raise DataError(
      f"data.dir = {root}: neither {IMAGES} nor gtFine is there. Name the folder into which leftImg8bit_trainvaltest.zip"
      " and gtFine_trainvaltest.zip are unzipped."
    )
  folder = root / kind / split
  if not folder.is_dir():
    raise DataError(f"{folder}: no such folder. Unzip {_zip(kind, split)} in {root}.")
  return folder


def _notes(names: list[str], split: str) -> list[str]:
  notes = count_note(split, len(names), datasets.CITYSCAPES_COUNTS[split])
  absent = set(datasets.CITYSCAPES_CITIES[split].split()) - {name.rsplit("_", 2)[0] for name in names}
  return notes + ([f"split {split!r} lacks the cities {', '.join(sorted(absent))}"] if absent else [])


class CityscapesSource(Source):
  """Random access to Cityscapes' left images, in the order of their names.

  Args:
    dir: the folder of leftImg8bit/ and gtFine/; with `format` "tfds", TFDS's data directory.
    split: "train", "val", "test" (no public labels), or "train_extra" (with labels="gtCoarse" only).
    format: "tree": Cityscapes' own folders; "tfds": TFDS's `cityscapes` under `dir`. Batches are the same, bit for bit.
    labels: "gtFine", or "gtCoarse", which train_extra needs.
    exif: see `images.Reading`.

  Raises:
    DataError: another split, a wrong root, or a missing zip, city or file, named.
  """

  def __init__(self, *, dir: str, split: str, format: str = "tree", labels: str = "gtFine", exif: str = "refuse"):
    if split not in datasets.CITYSCAPES_COUNTS:
      raise DataError(f"Cityscapes has no split {split!r}: choose one of {', '.join(datasets.CITYSCAPES_COUNTS)}.")
    if split == "train_extra" and labels != "gtCoarse":
      raise DataError("Cityscapes' train_extra has coarse labels only: set data.labels=gtCoarse, or another split.")
    if format == "tfds":
      variant = "semantic_segmentation" if labels == "gtFine" else "semantic_segmentation_extra"
      store = Records(
        dir,
        f"cityscapes/{variant}",
        (_TFDS_SPLITS[split],),
        image="image_left",
        mask="segmentation_label",
        id="image_id",
        reading=images.Reading(exif),
      )
    else:
      root = pathlib.Path(dir).expanduser()
      pairs = find_pairs(root, split, labels)
      store = Files(*pairs, images.Reading(exif), lambda: others(root, split, labels))
    super().__init__(
      store,
      *self.named_classes(),
      to_label,
      labelled=split != "test",
      notes=_notes(store.names, split),
      submission=datasets.CITYSCAPES_SUBMISSION,
    )

  @staticmethod
  def named_classes(**_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `input_pipeline.named_classes`."""
    return CLASSES, datasets.parse_colors([color for _, _, color in datasets.CITYSCAPES])
