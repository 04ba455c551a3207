"""PASCAL VOC 2012 segmentation, from its own folders or from TFDS's shards."""

import pathlib

import numpy as np

from segjax.input_pipeline import images, inventory, mask_values
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets
from segjax.input_pipeline.sources.base import Files, Source, count_note, find_folder
from segjax.input_pipeline.sources.tfds_store import Records

AUG_FOLDER = "SegmentationClassAug"  # Masks that segjax.prepare made from SBD.
# Splits of the TFDS data set `voc_segmentation`, which stores every image once.
TFDS_SPLITS = {
  "train": ("train",),
  "val": ("val",),
  "trainval": ("train", "val"),
  "trainaug": ("train", "sbd"),
  "test": ("test",),
}
_REMEDY = (
  "VOC's masks are palette PNGs that hold 0 to 20 and 255: restore the file from VOC's archive or segjax.prepare."
)


def find_root(dir: str) -> pathlib.Path:
  """The folder VOC2012 at, or below, `dir`.

  Raises:
    DataError: there is none.
  """
  folders, archive = ("VOC2012", "VOCdevkit/VOC2012"), "VOCtrainval_11-May-2012.tar"
  return find_folder(dir, folders, holds="JPEGImages", archive=archive)


def list_file(root: pathlib.Path, split: str) -> pathlib.Path:
  """Where the ids of a split are listed."""
  return root / "ImageSets" / "Segmentation" / f"{split}.txt"


def read_list(root: pathlib.Path, split: str) -> list[str]:
  """The ids of a split, sorted.

  Raises:
    DataError: no such list, one that is empty or lists an id twice, or a training list with images of val.
  """
  path = list_file(root, split)
  if not path.is_file():
    archive = "VOC2012test.tar" if split == "test" else "VOCtrainval_11-May-2012.tar"
    remedy = f"Unpack {archive} there."
    if split == "trainaug":
      remedy = "Make it from VOC and SBD: python -m segjax.prepare voc --devkit=VOCdevkit/VOC2012 --sbd=benchmark_RELEASE/dataset"
    raise DataError(f"{path}: no such list. {remedy}")
  names = images.read_lines(path)
  if not names:
    raise DataError(f"{path}: the split {split!r} is empty. Restore the list.")
  if len(set(names)) < len(names):
    twice = sorted({name for name in names if names.count(name) > 1})
    raise DataError(f"{path} lists {images.listed(twice)} more than once. Correct the list.")
  if split == "trainaug" and (leaked := set(names) & set(read_list(root, "val"))):
    raise DataError(f"{path} holds {len(leaked)} images of val: {images.listed(sorted(leaked))}. Remove them.")
  return sorted(names)


def find_pairs(root: pathlib.Path, split: str) -> tuple[list[str], list[tuple[pathlib.Path, pathlib.Path | None]]]:
  """Ids of a split, and their (image, mask) paths; mask None in `test`. VOC's own mask goes before one from SBD.

  Raises:
    DataError: what `read_list` raises, and every file that is missing.
  """
  names = read_list(root, split)
  folders = {folder: _stems(root / folder) for folder in ("JPEGImages", "SegmentationClass", AUG_FOLDER)}
  pairs, missing = [], []
  for name in names:
    mask = next((f for f in ("SegmentationClass", AUG_FOLDER) if name in folders[f]), None)
    if name not in folders["JPEGImages"]:
      missing.append(f"JPEGImages/{name}.jpg")
    if mask is None and split != "test":
      missing.append(f"{AUG_FOLDER if split == 'trainaug' else 'SegmentationClass'}/{name}.png")
    labelled = mask is not None and split != "test"
    pairs.append((root / "JPEGImages" / f"{name}.jpg", root / mask / f"{name}.png" if labelled else None))
  if missing:
    raise DataError(
      f"{list_file(root, split)} names files that are not in {root}: {len(missing)} are missing:"
      f" {images.listed(missing)}. Unpack VOC's archive again"
      + (", and run python -m segjax.prepare voc." if split == "trainaug" else ".")
    )
  return names, pairs


def _stems(folder: pathlib.Path) -> set[str]:
  return {path.stem for path in folder.iterdir()} if folder.is_dir() else set()


def others(root: pathlib.Path) -> dict[pathlib.Path, inventory.Unused]:
  """What no split can use; images without a mask are VOC's detection images, and nothing is wrong with them."""
  photos, found = inventory.search(root / "JPEGImages", levels=0)
  found |= {path: inventory.MISNAMED for path in photos if path.suffix != ".jpg"}
  names = {path.stem for path in photos if path.suffix == ".jpg"}
  for folder in filter(pathlib.Path.is_dir, (root / "SegmentationClass", root / AUG_FOLDER)):
    masks, unknown = inventory.search(folder, levels=0)
    found |= unknown | {path: inventory.NO_IMAGE for path in masks if path.stem not in names}
    found |= {path: inventory.MISNAMED for path in masks if path.suffix != ".png"}
  return found


def to_label(path: str, mask: np.ndarray) -> np.ndarray:
  """A VOC mask as stored, palette indices, to [H, W] uint8 ids in 0 to 20 or 255.

  Raises:
    DataError: an RGB file, or other values.
  """
  if mask.ndim == 3:
    raise DataError(f"{path}: an RGB file. {_REMEDY}")
  return mask_values.map_labels(path, mask, {}, len(datasets.VOC_CLASSES), _REMEDY)


class VocSource(Source):
  """Random access to VOC 2012, in the order of its image ids.

  Args:
    dir: VOC2012, or a folder above it; with `format` "tfds", TFDS's data directory.
    split: "train", "val", "trainval", "trainaug" (with SBD, from segjax.prepare) or "test" (no public labels).
    format: "tree": VOC's own folders; "tfds": the TFDS data set `voc_segmentation` under `dir`. Batches are the same, bit for
      bit.
    exif: see `images.Reading`.

  Raises:
    DataError: another split, a wrong root, or files that are missing, named.
  """

  def __init__(self, *, dir: str, split: str, format: str = "tree", exif: str = "refuse"):
    if split not in datasets.VOC_COUNTS:
      raise DataError(f"VOC has no split {split!r}: choose one of {', '.join(datasets.VOC_COUNTS)}.")
    if format == "tfds":
      features = dict(image="image", mask="label", id="id")
      store = Records(dir, "voc_segmentation", TFDS_SPLITS[split], **features, reading=images.Reading(exif))
    else:
      root = find_root(dir)
      store = Files(*find_pairs(root, split), images.Reading(exif), lambda: others(root))
    super().__init__(
      store,
      *self.named_classes(),
      to_label,
      labelled=split != "test",
      notes=count_note(split, len(store.names), datasets.VOC_COUNTS[split]),
      submission=datasets.voc_submission(split),
    )

  @staticmethod
  def named_classes(**_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `input_pipeline.named_classes`."""
    return datasets.VOC_CLASSES, datasets.palette(len(datasets.VOC_CLASSES))
