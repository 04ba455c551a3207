"""Reading image and mask files, with errors that name the file and the remedy. Pillow and NumPy only.

One reader serves both loaders, so their pixels are the same by construction, and Pillow gives palette masks as
indices, where TensorFlow's PNG decoder would expand the palette to colours (class 1 would arrive as grey 38).
"""

import os
import pathlib
import re
import stat
from typing import BinaryIO

import numpy as np
from PIL import Image

from segjax.config import IGNORE_LABEL


class DataError(Exception):
  """Input that cannot be used; the message names the file, what is wrong with it, and the remedy."""

  def __str__(self) -> str:
    return super().__str__().encode(errors="backslashreplace").decode()  # Paths need not be UTF-8.


def printable(name: str) -> str:
  """A file's name for one line of UTF-8: line ends, control characters and what is no UTF-8 as Python escapes them."""
  return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda c: c[0].encode("unicode_escape").decode(), name)


_BAD = 254  # Marks label values that mean nothing; the most classes are 254, numbered 0 to 253.

# Height times width; a few bytes may claim any. 16384 x 16384 in RGB are 0.8 GB. Pillow would warn from 2^26 on.
MAX_PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def read_lines(path: pathlib.Path) -> list[str]:
  """The lines of a list file that hold anything, without the spaces around it.

  Raises:
    DataError: it cannot be read, or is no text.
  """
  try:
    check_regular(path)  # Lines end at line ends alone: names may hold what str.splitlines() takes for one.
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
  except (OSError, ValueError) as error:
    raise DataError(f"{path}: not a readable text file ({error}). Restore it, in UTF-8.") from error


def check_regular(path: pathlib.Path | str) -> None:
  """Raises DataError where `path` is a folder, a pipe or a device, which might be waited for without end; OSError where
  there is nothing."""
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise DataError(f"{path}: no regular file (a folder, pipe or device). Put the file in its place, or remove it.")


def _check_pixels(path, image) -> None:
  if image.width * image.height > MAX_PIXELS:
    raise DataError(
      f"{path}: claims {image.height}x{image.width} pixels, more than {MAX_PIXELS} in all. Cut it into parts, or replace it"
      " if that cannot be true."
    )


def read_size(path: pathlib.Path | str, file: BinaryIO | None = None) -> tuple[int, int]:
  """(H, W) from the header of the file at `path`, without decoding; arguments as of `read_image`.

  Raises:
    DataError: missing, not an image, or one of more than `MAX_PIXELS`, which none of these functions reads.
  """
  try:
    if file is None:
      check_regular(path)
    with Image.open(file or path) as opened:
      _check_pixels(path, opened)
      return opened.height, opened.width
  except DataError:
    raise
  except FileNotFoundError as error:
    raise DataError(f"{path}: no such file. Restore it, or remove its name from the split.") from error
  except Exception as error:  # Each of Pillow's decoders has its own.
    raise DataError(f"{path}: not a readable image ({error}). Replace the file, or remove it.") from error


def _decode(path: pathlib.Path | str, file: BinaryIO | None, convert):
  try:
    if file is None:
      check_regular(path)
    with Image.open(file or path) as opened:
      _check_pixels(path, opened)
      opened.load()
      return convert(opened)
  except DataError:
    raise
  except FileNotFoundError as error:
    raise DataError(f"{path}: no such file. Restore it, or remove its name from the split.") from error
  except Exception as error:
    raise DataError(f"{path}: damaged or truncated ({error}). Replace the file, or remove it.") from error


def read_image(path: pathlib.Path | str, file: BinaryIO | None = None) -> np.ndarray:
  """[H, W, 3] uint8 RGB. Grey becomes three equal channels; transparency is dropped.

  Args:
    path: of the file, or its name in messages where `file` holds the bytes.
    file: an open file, for images inside other files.

  Raises:
    DataError: missing, damaged, or with more than 8 bits per channel, which RGB conversion would clip.
  """

  def convert(image):
    if image.mode.startswith(("I", "F")):
      raise DataError(f"{path}: {image.mode} pixels have more than 8 bits per channel. Convert the image to 8 bits.")
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))

  return _decode(path, file, convert)


def read_mask(path: pathlib.Path | str, file: BinaryIO | None = None) -> np.ndarray:
  """The stored numbers: [H, W] integers (palette files as indices), or [H, W, 3] uint8 for an RGB file.

  Arguments as of `read_image`.

  Raises:
    DataError: missing, damaged, or JPEG, whose compression changes labels along every edge.
  """

  def convert(image):
    if image.format == "JPEG":
      raise DataError(f"{path}: a JPEG cannot hold labels, its compression blurs them. Export masks as PNG.")
    if image.mode in ("RGB", "RGBA"):
      return np.asarray(image.convert("RGB"))
    if image.mode == "LA":
      image = image.getchannel(0)
    if image.mode == "F":
      raise DataError(f"{path}: floating-point pixels are no labels. Export masks with integer pixels.")
    mask = np.asarray(image)
    if mask.ndim != 2:
      raise DataError(f"{path}: {image.mode} pixels are no labels. Export masks as palette, grey or RGB.")
    return mask.astype(np.uint8) if mask.dtype == bool else mask

  return _decode(path, file, convert)


def size_problem(image_path, image_size, mask_path, mask_size) -> str:
  """Says that an image and its mask, both (H, W), differ, and what to do."""
  return (
    f"{mask_path} is {mask_size[0]}x{mask_size[1]}, but {image_path} is {image_size[0]}x{image_size[1]} (height x width)."
    " Export the mask at its image's size (never resize it with interpolation)."
  )


def listed(names) -> str:
  """The first ten names, and how many more there are."""
  names = list(names)
  return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def encode_colors(rgb: np.ndarray) -> np.ndarray:
  """[..., 3] uint8 -> [...] int32, red * 65536 + green * 256 + blue."""
  rgb = rgb.astype(np.int32)
  return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def map_colors(path, rgb: np.ndarray, table: dict[int, int], remedy: str = "") -> np.ndarray:
  """An RGB mask to ids through {encoded colour: id}.

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
      " masks as palette or grey PNGs of class ids."
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
