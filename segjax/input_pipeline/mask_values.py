"""What is stored in masks, numbers or colours, to class ids."""

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline.images import DataError

_BAD = 254  # Marks label values that mean nothing; the most classes are 254, numbered 0 to 253.


def encode_colors(rgb: np.ndarray) -> np.ndarray:
  """[..., 3] uint8 -> [...] int32, red * 65536 + green * 256 + blue."""
  rgb = rgb.astype(np.int32)
  return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def map_colors(path, rgb: np.ndarray, table: dict[int, int], remedy: str = "") -> np.ndarray:
  """An RGB mask (or a palette's) to ids through {encoded colour: id}.

  Args:
    remedy: what to do about other colours; empty for the advice that suits masks of one's own.

  Raises:
    DataError: no table, or colours outside it, with their pixel counts.
  """
  codes = encode_colors(rgb)
  colors, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
  unknown = [(f"{int(c):06X}", int(n)) for c, n in zip(colors, counts) if int(c) not in table]
  if unknown:
    listed = ", ".join(f"{color} ({count} px)" for color, count in unknown[:8])
    remedy = remedy or (
      "Name every class's colour in data.colors (in the order of data.classes) and void's in data.void_colors, or export"
      " masks as grey PNGs of class ids. (Palette PNGs are read by number where data.colors is empty.)"
    )
    raise DataError(f"{path}: an RGB mask with colours that no class has: {listed}. {remedy}")
  return np.array([table[int(c)] for c in colors], np.int64)[inverse].reshape(codes.shape)


def parse_label_map(text: str) -> dict[int, int]:
  """ "255:1,11:255" -> {255: 1, 11: 255}.

  Raises:
    DataError: text of another form, or a value named twice.
  """
  table = {}
  for item in filter(None, (part.strip() for part in text.split(","))):
    value, colon, target = item.partition(":")
    if not (colon and value.strip().isdecimal() and target.strip().isdecimal()):
      raise DataError(f"data.label_map: {item!r} is not of the form VALUE:CLASS, e.g. 255:1.")
    if int(value) in table:
      raise DataError(f"data.label_map names the value {int(value)} twice.")
    table[int(value)] = int(target)
  return table


def map_labels(path, mask: np.ndarray, label_map: dict[int, int], num_classes: int, remedy: str = "") -> np.ndarray:
  """Stored numbers to class ids, [H, W] uint8, all in [0, num_classes) or void.

  JAX would hide a bad label (an out-of-range one silently trains nothing, -1 wraps to the last class), so this check
  runs on every mask that is read.

  Args:
    label_map: {stored number: class id}; -1 refuses the number. Numbers not named keep their value.
    remedy: what to do about other values; empty for the advice that suits masks of one's own.

  Raises:
    DataError: other values, with their pixel counts and the remedy.
  """

  def to_id(value: int) -> int:
    label = label_map[value] if value in label_map else value
    return label if label == IGNORE_LABEL or 0 <= label < num_classes else _BAD

  if mask.dtype == np.uint8:  # A byte table: five times faster than NumPy's.
    label = mask.tobytes().translate(bytes(map(to_id, range(256))))
    if _BAD not in label:
      return np.frombuffer(label, np.uint8).reshape(mask.shape)
  if mask.dtype.itemsize > 2:
    values, inverse, counts = np.unique(mask, return_inverse=True, return_counts=True)
  else:  # A look-up table: ten times faster than the sort in np.unique.
    counts = np.bincount(mask.reshape(-1))
    values, inverse = np.arange(len(counts)), mask
  ids = np.array([to_id(int(v)) for v in values], np.uint8)
  bad = (ids == _BAD) & (counts > 0)
  if bad.any():
    present = values[counts > 0]
    listed = ", ".join(f"{int(v)} ({int(n)} px)" for v, n in list(zip(values[bad], counts[bad]))[:8])
    if remedy:
      raise DataError(f"{path}: label values that do not belong here: {listed}. {remedy}")
    if bad.sum() > 8:
      raise DataError(
        f"{path}: {bad.sum()} label values outside the {num_classes} classes (0 to {num_classes - 1}; {IGNORE_LABEL} is"
        f" void): {listed}, ... So many are those of a mask that was smoothed or resized, or that numbers instances."
        " Export it anew, with one number per class and no interpolation, or name all classes in data.classes."
      )
    raise DataError(
      f"{path}: label values outside the {num_classes} classes (0 to {num_classes - 1}; {IGNORE_LABEL} is void):"
      f" {listed}. Map them with data.label_map, e.g. {_suggest_map(values[bad], present, num_classes)}, or name all"
      " classes in data.classes."
    )
  return ids[inverse].reshape(mask.shape)


def _suggest_map(bad: np.ndarray, values: np.ndarray, num_classes: int) -> str:
  if num_classes == 2 and len(bad) == 1:
    return f"{int(bad[0])}:1"  # A binary mask drawn with another number than 1.
  if 0 not in values and int(values.max()) == num_classes:
    return ",".join(f"{i + 1}:{i}" for i in range(min(num_classes, 3))) + ("..." if num_classes > 3 else "")
  return f"{int(bad[0])}:{IGNORE_LABEL}"
