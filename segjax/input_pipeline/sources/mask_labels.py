"""What the masks of somebody's own data set mean, as config.data says it."""

import dataclasses
import pathlib

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import images, mask_values
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets


@dataclasses.dataclass(frozen=True)
class MaskLabels:
  """The classes of a data set, and the numbers or colours in its masks.

  Attributes:
    classes: names in the order of ids. Empty: the lines of `dir`/classes.txt, of the folder source.
    colors: one RRGGBB per class: overlays, and the meaning of RGB and palette masks. Empty: those of VOC for pictures; palette
      masks are read as numbers, refused if palettes contradict each other, and so are RGB masks.
    void_colors: RRGGBB of RGB and palette masks that mean void.
    label_map: mask values to ids, "255:1,11:255"; 255 is void. Values not named keep their number.
  """

  classes: tuple = ()
  colors: tuple = ()
  void_colors: tuple = ()
  label_map: str = ""


class MaskMeaning:
  """Masks as stored to class ids, by a `MaskLabels`.

  Raises:
    DataError: fields that contradict each other.
  """

  def __init__(self, labels: MaskLabels):
    self.classes = classes = tuple(labels.classes)
    colors, void_colors = labels.colors, labels.void_colors
    self.key = f"{classes} {colors} {void_colors} {labels.label_map}"  # Other labels only under another key.
    if len(classes) == 1:
      raise DataError(
        f"data.classes = {classes}: one class has nothing to be told from; a softmax over it is 1 everywhere. Name the"
        f" background too, as the first: data.classes=background,{classes[0]}."
      )
    if not 2 <= len(classes) < IGNORE_LABEL or len(set(classes)) < len(classes):
      raise DataError(f"data.classes = {classes}: needs 2 to 254 different names, background included.")
    self._label_map = mask_values.parse_label_map(labels.label_map)
    for value, target in self._label_map.items():
      if target >= len(classes) and target != IGNORE_LABEL:
        raise DataError(f"data.label_map sends {value} to {target}, but there are only {len(classes)} classes.")
    try:
      self.palette = datasets.parse_colors(colors) if colors else datasets.palette(len(classes))
      void = mask_values.encode_colors(datasets.parse_colors(void_colors)).tolist()
    except ValueError as error:
      raise DataError(f"data.colors or data.void_colors: {error}") from error
    if len(self.palette) != len(classes):
      raise DataError(f"data.colors names {len(self.palette)} colours for {len(classes)} classes; give one each.")
    self._by_color = bool(colors)
    codes = mask_values.encode_colors(self.palette).tolist() if colors else []
    self._color_table = dict.fromkeys(void, IGNORE_LABEL) | {code: i for i, code in enumerate(codes)}

  def reading(self, exif: str) -> images.Reading:
    """How to read files: palette masks by colour where colours are named, else by number, which all must mean the same."""
    to_class = {number: number for number in range(256)} | self._label_map
    named = [number for number in range(256) if to_class[number] < len(self.classes)]
    return images.Reading(exif, self._by_color, () if self._by_color else named)

  def to_label(self, path: str, mask: np.ndarray) -> np.ndarray:
    """A mask as stored to [H, W] uint8 class ids.

    Raises:
      DataError: other label values or colours.
    """
    if mask.ndim == 2:
      return mask_values.map_labels(path, mask, self._label_map, len(self.classes))
    ids = mask_values.map_colors(path, mask, self._color_table)
    return mask_values.map_labels(path, ids, {}, len(self.classes))  # Colours name their class already.


def with_class_names(labels: MaskLabels, root: pathlib.Path) -> MaskLabels:
  """`labels` with the lines of `root`/classes.txt, where it names no classes.

  Raises:
    DataError: no such file.
  """
  if labels.classes:
    return labels
  path = root / "classes.txt"
  if not path.is_file():
    raise DataError(
      "The classes have no names: set data.classes, e.g. --config.data.classes=background,cell, or write them to"
      f" {path}, one a line, in the order of the mask values."
    )
  return dataclasses.replace(labels, classes=tuple(images.read_lines(path)))
