"""Your own images and masks, paired by name, by folder or by list file."""

import pathlib

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import datasets
from segjax.input_pipeline import images as images_lib
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.order import mix
from segjax.input_pipeline.source import Files, Source

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".pgm")


class MaskMeaning:
  """What the numbers or colours in the masks of somebody's own data set mean.

  Args:
    classes, colors, void_colors, label_map: fields of config.data.

  Raises:
    DataError: fields that contradict each other.
  """

  def __init__(self, classes: tuple, colors: tuple, void_colors: tuple, label_map: str):
    self.classes = classes
    if not 2 <= len(classes) < IGNORE_LABEL or len(set(classes)) < len(classes):
      raise DataError(f"data.classes = {classes}: needs 2 to 254 different names, background included.")
    self._label_map = images_lib.parse_label_map(label_map)
    for value, target in self._label_map.items():
      if target >= len(classes) and target != IGNORE_LABEL:
        raise DataError(f"data.label_map sends {value} to {target}, but there are only {len(classes)} classes.")
    try:
      self.palette = datasets.parse_colors(colors) if colors else datasets.palette(len(classes))
      void = images_lib.encode_colors(datasets.parse_colors(void_colors)).tolist()
    except ValueError as error:
      raise DataError(f"data.colors or data.void_colors: {error}") from error
    if len(self.palette) != len(classes):
      raise DataError(f"data.colors names {len(self.palette)} colours for {len(classes)} classes; give one each.")
    codes = images_lib.encode_colors(self.palette).tolist() if colors else []
    self._color_table = dict.fromkeys(void, IGNORE_LABEL) | {code: i for i, code in enumerate(codes)}

  def to_label(self, path: str, mask: np.ndarray) -> np.ndarray:
    """A mask as stored to [H, W] uint8 class ids.

    Raises:
      DataError: other label values or colours.
    """
    if mask.ndim == 2:
      return images_lib.map_labels(path, mask, self._label_map, len(self.classes))
    ids = images_lib.map_colors(path, mask, self._color_table)
    return images_lib.map_labels(path, ids, {}, len(self.classes))  # Colours name their class already.


class FolderSource(Source):
  """Random access to image and mask files.

  All files are paired at construction, and `canvas_size` compares their headers, so that what is missing or of another
  size is told before training, all of it at once.

  Args:
    dir: root folder.
    split: fills in "{split}" in the patterns below. Where none of them has it, "train" and "val" share all images:
      a `holdout` part, chosen by a hash of the name, is "val".
    images, masks: folders under `dir`, searched with their subfolders. A mask has its image's name and `mask_suffix`.
    list: list file under `dir`; a line is a name, or the paths of an image and its mask (SegNet's CamVid lists).
    classes: names in the order of ids; empty: the lines of `dir`/classes.txt.
    colors: RRGGBB per class; empty: the VOC palette, and RGB masks are refused.
    void_colors: RRGGBB that mean void in RGB masks.
    label_map: "VALUE:CLASS,..."; 255 is void.

  Raises:
    DataError: missing folder, list, image or mask, an empty split, or options that contradict each other; each with the
      remedy.
  """

  def __init__(self, *, dir: str, split: str, images: str, masks: str, mask_suffix: str, list: str, holdout: float,
               classes: tuple, colors: tuple, void_colors: tuple, label_map: str):  # fmt: skip
    self._root = pathlib.Path(dir).expanduser()
    if not self._root.is_dir():
      raise DataError(f"data.dir = {dir}: no such folder. Name the root of the data set.")
    meaning = MaskMeaning(tuple(classes) or self._read_classes(), colors, void_colors, label_map)
    pairs = self._find_pairs(split, images, masks, mask_suffix, list, holdout)
    names = [image.relative_to(self._root).with_suffix("").as_posix() for image, _ in pairs]
    super().__init__(Files(names, pairs), meaning.classes, meaning.palette, meaning.to_label)

  def _read_classes(self) -> tuple[str, ...]:
    path = self._root / "classes.txt"
    if not path.is_file():
      raise DataError(
        "The classes have no names: set data.classes, e.g. --config.data.classes=background,cell, or write them to"
        f" {path}, one a line, in the order of the mask values."
      )
    return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())

  def _find_pairs(self, split, images, masks, mask_suffix, list_file, holdout):
    fixed = not any("{split}" in pattern for pattern in (images, masks, list_file))
    if fixed and split not in ("train", "val"):
      raise DataError(
        f"split {split!r}: data.images, data.masks and data.list name no {{split}}, so there are only train and val"
        f" (a share of {holdout} of all images). Use {{split}} in one of the three."
      )
    if list_file:
      path = self._root / list_file.format(split=split)
      if not path.is_file():
        raise DataError(f"{path}: no such list file. Check data.list and the split {split!r}.")
      entries = [line.split() for line in path.read_text().splitlines() if line.strip()]
    else:
      entries = None
    if entries and all(len(entry) == 2 for entry in entries):
      pairs = [(self._resolve(path, image), self._resolve(path, mask)) for image, mask in entries]
    else:
      found = self._files(images.format(split=split), "data.images")
      found_masks = self._files(masks.format(split=split), "data.masks")
      names = sorted(found) if entries is None else [self._name(path, entry) for entry in entries]
      if fixed and entries is None:
        # By name, so that adding images moves no other image to the other side.
        held = {name for name in names if int(mix(*name.encode())) / 2**64 < holdout}
        names = [name for name in names if (name in held) == (split == "val")]
      missing = [f"image {name}" for name in names if name not in found]
      missing += [
        f"mask {name}{mask_suffix}" for name in names if name in found and name + mask_suffix not in found_masks
      ]
      if missing:
        raise DataError(
          f"split {split!r} of {self._root}: {len(missing)} files are missing: {images_lib.listed(missing)}. Masks carry their"
          f" image's name plus data.mask_suffix ({mask_suffix!r}). Add the files, or remove the names or images."
        )
      pairs = [(found[name], found_masks[name + mask_suffix]) for name in names]
    if not pairs:
      where = list_file or images
      raise DataError(
        f"split {split!r} of {self._root} is empty ({where.format(split=split)}). Check the split's name."
      )
    return pairs

  def _files(self, folder: str, field: str) -> dict[str, pathlib.Path]:
    """All image files below `folder`, by their path without extension."""
    root = self._root / folder
    if not root.is_dir():
      present = sorted(p.name for p in self._root.iterdir())
      raise DataError(
        f"{root}: no such folder. {self._root} holds {images_lib.listed(present)}; set {field} to the right one."
      )
    files = {}
    for path in sorted(root.rglob("*")):
      if path.suffix.lower() in EXTENSIONS:
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in files:
          raise DataError(f"{files[name]} and {path} have the same name. Remove one of the two.")
        files[name] = path
    return files

  @staticmethod
  def _name(path, entry) -> str:
    if len(entry) != 1:
      raise DataError(f"{path}: {' '.join(entry)!r} is neither one name nor an image and a mask. Correct the line.")
    name = entry[0]
    return name[: -len(pathlib.PurePath(name).suffix)] if name.lower().endswith(EXTENSIONS) else name

  def _resolve(self, list_path, text: str) -> pathlib.Path:
    """A listed path under the root; leading folders of the list's author (/SegNet/CamVid/train/...) are dropped."""
    parts = pathlib.PurePosixPath(text).parts
    for start in range(len(parts)):
      candidate = self._root.joinpath(*[part for part in parts[start:] if part != "/"])
      if candidate.is_file():
        return candidate
    raise DataError(f"{list_path} names {text}, which is not under {self._root}. Add the file, or remove the line.")
