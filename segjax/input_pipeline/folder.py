"""Your own images and masks, paired by name, by folder or by list file."""

import functools
import pathlib

import numpy as np
from scipy import ndimage

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import borders, datasets
from segjax.input_pipeline import images as images_lib
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.source import Files, Source, held_out

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
    self.key = f"{classes} {colors} {void_colors} {label_map}"  # Other labels only under another key.
    if len(classes) == 1:
      raise DataError(
        f"data.classes = {classes}: one class has nothing to be told from; a softmax over it is 1 everywhere. Name the"
        f" background too, as the first: data.classes=background,{classes[0]}."
      )
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


def read_classes(root: pathlib.Path) -> tuple[str, ...]:
  """The lines of `root`/classes.txt, for config.data without classes.

  Raises:
    DataError: no such file.
  """
  path = root / "classes.txt"
  if not path.is_file():
    raise DataError(
      "The classes have no names: set data.classes, e.g. --config.data.classes=background,cell, or write them to"
      f" {path}, one a line, in the order of the mask values."
    )
  return tuple(images_lib.read_lines(path))


class FolderSource(Source):
  """Random access to image and mask files.

  All files are paired at construction, and `canvas_size` compares their headers, so that what is missing or of another
  size is told before training, all of it at once.

  Args:
    dir: root folder.
    split: fills in "{split}" in the patterns below. Where none of them has it, "train" and "val" share all images:
      what `held_out` chooses is "val".
    images, masks: folders under `dir`, searched with their subfolders. A mask has its image's name and `mask_suffix`.
    holdout, folds, fold, split_seed, group: see `held_out`.
    list: list file under `dir`; a line is a name, or the paths of an image and its mask (SegNet's CamVid lists).
    classes: names in the order of ids; empty: the lines of `dir`/classes.txt.
    colors: RRGGBB per class; empty: the VOC palette, and RGB masks are refused.
    void_colors: RRGGBB that mean void in RGB masks.
    label_map: "VALUE:CLASS,..."; 255 is void.
    instances: folder of masks with a number per instance, or "components"; what `border` needs. Empty: none.
    border_sigma: pixels, of `border`.

  Raises:
    DataError: missing folder, list, image or mask, an empty split, or options that contradict each other; each with the
      remedy.
  """

  def __init__(self, *, dir: str, split: str, images: str, masks: str, mask_suffix: str, list: str, holdout: float,
               folds: int, fold: int, split_seed: int, group: str, classes: tuple, colors: tuple, void_colors: tuple,
               label_map: str, instances: str, border_sigma: float):  # fmt: skip
    self._root = pathlib.Path(dir).expanduser()
    if not self._root.is_dir():
      raise DataError(f"data.dir = {dir}: no such folder. Name the root of the data set.")
    meaning = MaskMeaning(tuple(classes) or read_classes(self._root), colors, void_colors, label_map)
    held = functools.partial(held_out, holdout=holdout, folds=folds, fold=fold, seed=split_seed, group=group)
    pairs = self._find_pairs(split, images, masks, mask_suffix, list, held)
    self._images, self._pairs = self._root / images.format(split=split), pairs
    self._mask_key = meaning.key
    self._instances, self._border_sigma = instances.format(split=split), border_sigma
    names = [image.relative_to(self._root).with_suffix("").as_posix() for image, _ in pairs]
    super().__init__(Files(names, pairs), meaning.classes, meaning.palette, meaning.to_label, meaning=meaning.key)

  @functools.cached_property
  def border_files(self) -> list[pathlib.Path]:
    """For each example, the file that its instances come from.

    Raises:
      DataError: no instances are configured, or masks of them are missing.
    """
    if not self._instances:
      raise DataError(
        "A weight map needs to know where instances touch: set data.instances to the folder of their masks, or to"
        ' "components"; or set loss.border_weight = 0.'
      )
    if self._instances == "components":
      return [mask for _, mask in self._pairs]
    found = self._files(self._instances, "data.instances", ', or to "components", or set loss.border_weight = 0')
    names = []
    for image, _ in self._pairs:
      inside = image.is_relative_to(self._images)
      names.append((image.relative_to(self._images) if inside else pathlib.Path(image.name)).with_suffix("").as_posix())
    missing = [name for name in names if name not in found]
    if missing:
      raise DataError(
        f"{self._root / self._instances}: {len(missing)} masks of instances are missing:"
        f" {images_lib.listed(missing)}. Add them, or set loss.border_weight = 0."
      )
    return [found[name] for name in names]

  def border(self, index: int) -> np.ndarray:
    """[H, W] float16 in [0, 1], how much the ground between two instances weighs; see `borders.border_map`.

    Raises:
      DataError: what `border_files` raises, a damaged file, or one that is no mask of instances.
    """
    path = self.border_files[index]

    def components():
      label = self[index][1]
      return ndimage.label((label != 0) & (label != IGNORE_LABEL))[0]

    def numbers():
      mask = images_lib.read_mask(path)
      if mask.ndim != 2 or mask.min() < 0:
        raise DataError(f"{path}: no mask of instances. Store one number per instance, and 0 where there is none.")
      if mask.max() == IGNORE_LABEL and not ((mask > 0) & (mask < IGNORE_LABEL)).any():
        raise DataError(
          f"{path}: no mask of instances, it holds 0 and 255 alone. Where touching instances are drawn apart, set"
          ' data.instances="components"; else store one number per instance.'
        )
      image = self._pairs[index][0]
      if mask.shape != (size := images_lib.read_size(image)):
        raise DataError(images_lib.size_problem(image, size, path, mask.shape))
      return np.unique(mask, return_inverse=True)[1].reshape(mask.shape) + (mask.min() > 0)

    read = components if self._instances == "components" else numbers
    return borders.cached_border_map(path, f"{self._instances} {self._mask_key}", read, self._border_sigma)

  @staticmethod
  def named_classes(*, dir, classes, colors, void_colors, label_map, **_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `input_pipeline.named_classes`."""
    classes = tuple(classes) or read_classes(pathlib.Path(dir).expanduser())
    meaning = MaskMeaning(classes, colors, void_colors, label_map)
    return meaning.classes, meaning.palette

  def _find_pairs(self, split, images, masks, mask_suffix, list_file, held_out):
    fixed = not any("{split}" in pattern for pattern in (images, masks, list_file))
    if fixed and split not in ("train", "val"):
      raise DataError(
        f"split {split!r}: data.images, data.masks and data.list name no {{split}}, so there are only train and val"
        " (data.holdout or data.folds of all images). Use {split} in one of the three."
      )
    if list_file:
      path = self._root / list_file.format(split=split)
      if not path.is_file():
        raise DataError(f"{path}: no such list file. Check data.list and the split {split!r}.")
      entries = [line.split() for line in images_lib.read_lines(path)]
    else:
      entries = None
    if entries and all(len(entry) == 2 for entry in entries):
      pairs = [(self._resolve(path, image), self._resolve(path, mask)) for image, mask in entries]
    else:
      found = self._files(images.format(split=split), "data.images")
      found_masks = self._files(masks.format(split=split), "data.masks")
      names = sorted(found) if entries is None else [self._name(path, entry) for entry in entries]
      if fixed and entries is None:
        held = held_out(names)
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

  def _files(self, folder: str, field: str, otherwise: str = "") -> dict[str, pathlib.Path]:
    """All image files below `folder`, by their path without extension."""
    root = self._root / folder
    if not root.is_dir():
      present = sorted(p.name for p in self._root.iterdir())
      raise DataError(
        f"{root}: no such folder. {self._root} holds {images_lib.listed(present)}; set {field} to the right one{otherwise}."
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
