"""Your own images and masks, paired by name, by folder or by list file."""

import dataclasses
import functools
import glob
import os
import pathlib
import re

import numpy as np
from scipy import ndimage

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import borders, inventory
from segjax.input_pipeline import images as images_lib
from segjax.input_pipeline.images import DataError, Pixels
from segjax.input_pipeline.masks import read_mask, size_problem
from segjax.input_pipeline.sources.base import Files, Source
from segjax.input_pipeline.sources.holdout import HoldOut
from segjax.input_pipeline.sources.mask_labels import MaskLabels, MaskMeaning, with_class_names


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where images and masks are, below the root folder.

  Attributes:
    images: folder of images under `dir`, searched with its subfolders.
    masks: folder of masks under `dir`, searched likewise; a mask has its image's name, any extension.
    mask_suffix: what a mask's name has behind its image's name, e.g. "_mask".
    list: list file under `dir`, e.g. "{split}.txt"; a line is a name, or the paths of an image and its mask (SegNet's CamVid
      lists). Empty: all.
  """

  images: str = "images/{split}"
  masks: str = "masks/{split}"
  mask_suffix: str = ""
  list: str = ""


class FolderSource(Source):
  """Random access to image and mask files.

  All files are paired at construction, and `canvas_size` compares their headers, so that all files that are missing or of
  another size are named before training.

  Args:
    dir: root folder.
    split: fills in "{split}" in the patterns below. Where none of them has it, "train" and "val" share all images:
      what `hold_out` chooses is "val".
    layout: where images and masks are.
    hold_out: how "val" is chosen there.
    group: regular expression: images in whose names it finds the same text are held out together, e.g. "^[^_]+", what is
      before the first _. Empty: each by itself.
    mask_labels: what the masks mean.
    instances: folder of masks of instances (0: none), by the image's name, for loss.border_weight. "components": the
      connected components of all classes but the first. Empty: none.
    border_sigma: pixels; how far apart instances may be for the ground between them to weigh more.
    exif: see `images.Reading`.
    pixels: what the images hold.

  Raises:
    DataError: missing folder, list, image or mask, an empty split, or options that contradict each other; each with the
      remedy.
  """

  def __init__(
    self,
    *,
    dir: str,
    split: str,
    exif: str = "refuse",
    layout: Layout = Layout(),
    hold_out: HoldOut = HoldOut(),
    group: str = "",
    mask_labels: MaskLabels = MaskLabels(),
    instances: str = "",
    border_sigma: float = 5.0,
    pixels: Pixels = Pixels(),
  ):
    self._root = pathlib.Path(dir).expanduser()
    if not self._root.is_dir():
      raise DataError(f"data.dir = {dir}: no such folder. Name the root of the data set.")
    meaning = MaskMeaning(with_class_names(mask_labels, self._root))
    pairs, others = self._find_pairs(split, layout, lambda names: hold_out.choose(names, group))
    self._images, self._pairs = self._root / layout.images.format(split=split), pairs
    self._mask_key = meaning.key
    self._instances, self._border_sigma = instances.format(split=split), border_sigma
    names = [self._name(image) for image, _ in pairs]

    def all_others():
      lists = glob.glob(layout.list.format(split="*"), root_dir=self._root) if layout.list else []
      own = (self._root / name for name in (*lists, "classes.txt"))
      return inventory.without(others() | self._other_instances(), own)

    reading = dataclasses.replace(meaning.reading(exif), channels=pixels.channels, depth=pixels.depth)
    store = Files(names, pairs, reading, all_others)
    super().__init__(store, meaning.classes, meaning.palette, meaning.to_label, meaning=meaning.key)
    self.pixels = pixels

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
    found, _ = self._files(self._instances, "data.instances", ', or to "components", or set loss.border_weight = 0')
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

  def _other_instances(self) -> dict[pathlib.Path, inventory.Unused]:
    if self._instances in ("", "components") or not (self._root / self._instances).is_dir():
      return {}
    found, others = self._files(self._instances, "data.instances")
    images, _ = inventory.search(self._images) if self._images.is_dir() else ([], {})
    names = {image.relative_to(self._images).with_suffix("").as_posix() for image in images}
    return others | {path: inventory.NO_IMAGE for name, path in found.items() if images and name not in names}

  def files(self, border: bool = False) -> dict[str, list[pathlib.Path]]:
    """See `Source.files`."""
    return super().files() | (dict(instances=self.border_files) if border else {})

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
      mask = read_mask(path)
      if mask.ndim != 2 or mask.min() < 0:
        raise DataError(f"{path}: no mask of instances. Store one number per instance, and 0 where there is none.")
      if mask.max() == IGNORE_LABEL and not ((mask > 0) & (mask < IGNORE_LABEL)).any():
        raise DataError(
          f"{path}: no mask of instances, it holds 0 and 255 alone. Where touching instances are drawn apart, set"
          ' data.instances="components"; else store one number per instance.'
        )
      image, mask_path = self._pairs[index]
      if mask.shape != (size := images_lib.read_size(mask_path)):  # The image's, as it is shown.
        raise DataError(size_problem(image, size, path, mask.shape))
      return np.unique(mask, return_inverse=True)[1].reshape(mask.shape) + (mask.min() > 0)

    read = components if self._instances == "components" else numbers
    return borders.cached_border_map(path, f"{self._instances} {self._mask_key}", read, self._border_sigma)

  @staticmethod
  def named_classes(*, dir, mask_labels, **_) -> tuple[tuple[str, ...], np.ndarray]:
    """See `sources.named_classes`."""
    meaning = MaskMeaning(with_class_names(mask_labels, pathlib.Path(dir).expanduser()))
    return meaning.classes, meaning.palette

  def _find_pairs(self, split: str, layout: Layout, choose):
    """(image, mask) paths, and () -> what else lies in their folders; `choose(names)` gives those that are held out."""
    images, masks, suffix, list_file = dataclasses.astuple(layout)
    fixed = not any("{split}" in pattern for pattern in (images, masks, list_file))
    if fixed and split not in ("train", "val"):
      raise DataError(
        f"split {split!r}: data.images, data.masks and data.list name no {{split}}, so there are only train and val"
        " (data.holdout or data.folds of all images). Use {split} in one of the three."
      )
    names = None
    if list_file:
      path = self._root / list_file.format(split=split)
      if not path.is_file():
        raise DataError(f"{path}: no such list file. Check data.list and the split {split!r}.")
      pairs, names = self._read_list(path)
      if pairs:
        return pairs, lambda: self._beside(pairs)
    found, others = self._files(images.format(split=split), "data.images")
    found_masks, more = self._files(masks.format(split=split), "data.masks")
    others = others | more | _unlisted(found_masks, found, suffix) | dict.fromkeys(found.values(), inventory.UNLISTED)
    if names is None:
      names = sorted(found)
      held = choose(names) if fixed else ()
      names = [name for name in names if not fixed or (name in held) == (split == "val")]
    missing = [f"image {name}" for name in names if name not in found]
    missing += [f"mask {name}{suffix}" for name in names if name in found and name + suffix not in found_masks]
    if missing:
      raise DataError(
        f"split {split!r} of {self._root}: {len(missing)} files are missing: {images_lib.listed(missing)}. Masks carry their"
        f" image's name plus data.mask_suffix ({suffix!r}). Add the files, or remove the names or images."
      )
    if not names:
      where = list_file or images
      raise DataError(
        f"split {split!r} of {self._root} is empty ({where.format(split=split)}). Check the split's name."
      )
    return [(found[name], found_masks[name + suffix]) for name in names], lambda: others

  def _read_list(self, path: pathlib.Path) -> tuple[list[tuple[pathlib.Path, pathlib.Path]], list[str]]:
    """The (image, mask) paths that the lines name, or else their names without endings; either may hold spaces.

    Raises:
      DataError: a line that names no pair of files, or several, where others name one.
    """
    lines = images_lib.read_lines(path)
    found = {line: self._resolve_pairs(line) for line in lines}
    if not any(found.values()):
      return [], [
        line[: -len(pathlib.PurePath(line).suffix)] if line.lower().endswith(inventory.EXTENSIONS) else line
        for line in lines
      ]
    for line, pairs in found.items():
      if len(pairs) != 1:
        what = f"can be read as {len(pairs)} pairs" if pairs else "is no pair"
        raise DataError(
          f"{path}: {line!r} {what} of an image and a mask under {self._root}. Add the files, or correct the line."
        )
    return [found[line][0] for line in lines], []

  def _name(self, image: pathlib.Path) -> str:
    """Relative to the root; of an image elsewhere (data.images="../x") without the parts that lead there."""
    inside = image.relative_to(self._root) if image.is_relative_to(self._root) else image.relative_to(image.anchor)
    return pathlib.PurePath(*(part for part in inside.parts if part != "..")).with_suffix("").as_posix()

  def _resolve_pairs(self, line: str) -> list[tuple[pathlib.Path, pathlib.Path]]:
    gaps = re.finditer(r"\s+", line)
    pairs = [(self._resolve(line[: gap.start()]), self._resolve(line[gap.end() :])) for gap in gaps]
    return [pair for pair in pairs if all(pair)]

  def _beside(self, pairs) -> dict[pathlib.Path, inventory.Unused]:
    """What else lies in the folders of listed files; other splits may lie there as well."""
    others = {}
    for folder in {path.parent for pair in pairs for path in pair}:
      files, found = inventory.search(folder, levels=0)
      others |= found | dict.fromkeys(files, inventory.UNLISTED)
    return {path: inventory.UNLISTED if why is inventory.FOLDER else why for path, why in others.items()}

  def _files(self, folder: str, field: str, otherwise: str = "") -> tuple[dict[str, pathlib.Path], dict]:
    """All image files below `folder`, by their path without extension; and what else lies there."""
    root = self._root / folder
    if not root.is_dir():
      present = sorted(p.name for p in self._root.iterdir())
      raise DataError(
        f"{root}: no such folder. {self._root} holds {images_lib.listed(present)}; set {field} to the right one{otherwise}."
      )
    files = {}
    paths, others = inventory.search(root)
    for path in paths:
      name = path.relative_to(root).with_suffix("").as_posix()
      if name in files:
        raise DataError(f"{files[name]} and {path} have the same name. Remove one of the two.")
      files[name] = path
    return files, others

  def _resolve(self, text: str) -> pathlib.Path | None:
    """A listed path under the root; leading folders of the list's author (/SegNet/CamVid/train/...) are dropped."""
    parts = pathlib.PurePosixPath(text).parts
    for start in range(len(parts)):
      candidate = self._root.joinpath(*[part for part in parts[start:] if part != "/"])
      if os.path.isfile(candidate):  # Not Path.is_file(), which raises for names that are too long.
        return candidate
    return None


def _unlisted(masks: dict[str, pathlib.Path], images: dict, suffix: str) -> dict[pathlib.Path, inventory.Unused]:
  """Why a mask is not used, if it is not."""
  return {
    path: inventory.UNLISTED if name.endswith(suffix) and name.removesuffix(suffix) in images else inventory.NO_IMAGE
    for name, path in masks.items()
  }
