"""Reading mask files as they are stored; what could not be read as it was meant is refused. `mask_values` maps the numbers."""

import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from segjax.input_pipeline import rasters
from segjax.input_pipeline.images import (
  JPEGS,
  DataError,
  Reading,
  decode,
  header_of,
  is_deep,
  opened,
  read_header,
  storage,
)


def _check_mask(path, image: ImageFile.ImageFile) -> None:
  """Raises DataError where a file cannot give its labels as they were meant."""
  if image.format in JPEGS or ("compression" in image.info and "jpeg" in str(image.info["compression"])):
    raise DataError(f"{path}: a JPEG cannot hold labels, its compression blurs them. Export masks as PNG.")
  if re.search(r";\d?I", storage(image)[0]):
    raise DataError(f"{path}: counts from white to black, which inverts its labels. Export masks as PNG.")
  if image.mode == "F":
    raise DataError(f"{path}: floating-point pixels are no labels. Export masks with integer pixels.")
  if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA") and not image.mode.startswith("I"):
    raise DataError(f"{path}: {image.mode} pixels are no labels. Export masks as palette, grey or RGB.")
  if not image.mode.startswith("I") and is_deep(image):
    raise DataError(f"{path}: its {image.mode} pixels have more than 8 bits per channel. Export masks with 8 bits.")
  if (orientation := header_of(path, image).orientation) != 1:
    raise DataError(f"{path}: EXIF gives the mask orientation {orientation}. Export masks as PNG, without EXIF.")


def _check_opaque(path, image: Image.Image, mask: np.ndarray) -> None:
  """Raises DataError where pixels of a mask are transparent: the labels stored there were never visible."""
  clear = image.info["transparency"] if "transparency" in image.info else ()
  if "A" in image.getbands():
    count = int((np.asarray(image.getchannel("A")) < 255).sum())
  elif isinstance(clear, bytes):  # The opacity of each number, 255 beyond the end.
    count = int(np.isin(mask, np.flatnonzero(np.frombuffer(clear, np.uint8) < 255)).sum())
  elif isinstance(clear, tuple):
    count = int((mask == np.array(clear)).all(-1).sum()) if clear else 0
  else:
    count = int((mask == clear).sum())
  if count:
    raise DataError(
      f"{path}: {count} of the mask's pixels are transparent, so their labels are not seen. Fill them with a class or"
      " with void (255, or one of data.void_colors), and export masks without transparency."
    )


def read_mask(path: pathlib.Path | str, file: BinaryIO | None = None, *, by_color: bool = False) -> np.ndarray:
  """The stored numbers: [H, W] integers (palette files as indices), or [H, W, 3] uint8 for an RGB file.

  Grey of 1, 2 or 4 bits gives what is stored, 0 to 1, 3 or 15, not spread over 0 to 255 as for a picture.

  Args:
    path, file: see `images.read_image`.
    by_color: whether palette files are RGB too.

  Raises:
    DataError: missing, damaged, one of several frames, with transparent pixels, more than 8 bits per colour, turned by
      EXIF, or JPEG, whose compression changes labels along every edge.
  """
  with opened(path, file, "damaged or truncated") as image:
    _check_mask(path, image)
    mode, white = storage(image)
    if image.mode == "RGBA":
      mask = np.asarray(image.convert("RGB"))
    elif image.mode in ("LA", "PA"):
      mask = np.asarray(image.getchannel(0))
    else:
      mask = decode(image)
      if mode.startswith(("L;2", "L;4")):  # Pillow has spread them.
        mask = mask // (85 if mode.startswith("L;2") else 17)
      elif image.format == "PPM" and white != 255:
        most = 65535 if image.mode == "I" else 255
        mask = (mask.astype(np.int64) * white + most // 2) // most
    _check_opaque(path, image, mask)
    if by_color and image.mode in ("P", "PA"):
      return np.asarray(image.convert("RGB"))
    return mask.astype(np.uint8) if mask.dtype == bool else mask


class MaskHeaders:
  """Checks by their headers that the masks of a split mean the same by the same numbers.

  Args:
    same_colors: see `Reading`.
  """

  def __init__(self, same_colors: Sequence[int]):
    self._same_colors = same_colors
    self._colors = {}  # {number: (its colour, the file that says so)}
    self._depths = {}  # {whether grey has fewer than 8 bits: the file that has it}

  def size(self, path: pathlib.Path | str, file: BinaryIO | None = None) -> tuple[int, int]:
    """(H, W) of one more mask; arguments: see `images.read_image`.

    Raises:
      DataError: what `read_header` raises, or a mask that contradicts an earlier one, which is named too.
    """
    with opened(path, file, "not a readable image") as image:
      if image.mode == "P" and self._same_colors:
        self._compare_colors(path, _palette(image))
      elif image.mode in ("1", "L") or image.mode.startswith("I"):
        self._compare_depth(path, image.mode == "1" or storage(image)[0].startswith(("L;2", "L;4")))
      return image.height, image.width

  def _compare_colors(self, path, palette: bytes) -> None:
    for number in self._same_colors:
      color = palette[3 * number : 3 * number + 3]
      known, other = self._colors.setdefault(number, (color, path)) if color else (color, path)
      if known != color:
        raise DataError(
          f"{path} and {other}: palettes that contradict each other. {number} is {color.hex().upper()} in the first,"
          f" {known.hex().upper()} in the other, so that their numbers do not mean the same. Name every class's colour in"
          " data.colors, to read palette masks by colour, or export all masks with one palette."
        )

  def _compare_depth(self, path, few: bool) -> None:
    self._depths.setdefault(few, path)
    if len(self._depths) == 2:
      raise DataError(
        f"{self._depths[True]} stores fewer than 8 bits a pixel, {self._depths[False]} does not. Programs that save space"
        " write 255 as 1 if a file holds nothing between, so it is not known what 1 means. Export all masks with 8 bits."
      )


def _palette(image: ImageFile.ImageFile) -> bytes:
  """Red, green and blue of each number that the palette names."""
  if image.palette.rawmode != "RGB":  # Of other formats than PNG and GIF.
    return bytes(image.getpalette("RGB"))
  return bytes(image.palette.palette)


def size_problem(image_path, image_size, mask_path, mask_size) -> str:
  """Says that an image and its mask, both (H, W), differ, and what to do."""
  return (
    f"{mask_path} is {mask_size[0]}x{mask_size[1]}, but {image_path} is {image_size[0]}x{image_size[1]} (height x width)."
    " Export the mask at its image's size (never resize it with interpolation)."
  )


def read_sizes(examples: Iterable[tuple], reading: Reading) -> tuple[list[tuple[int, int]], set[str]]:
  """(h, w) of each image as `images.read_image` gives it, from their headers; and the EXIF rules that the masks' sizes imply.

  Args:
    examples: (image's path, its open file or None, mask's path, its open file or None); a mask's path is None without one.

  Raises:
    DataError: every header that cannot be read, and every mask of another size than its image; the first 20 are named.
  """
  masks, sizes, rules, problems = MaskHeaders(reading.same_colors), [], set(), []
  for image_path, image_file, mask_path, mask_file in examples:
    try:
      header = rasters.read_header(image_path, reading) if reading.channels else read_header(image_path, image_file)
      mask_size = masks.size(mask_path, mask_file) if mask_path else None
      size = header.size_by(reading.exif, mask_size)
      if mask_size and size != mask_size:
        raise DataError(size_problem(image_path, size, mask_path, mask_size))
      rules.add(header.rule_by(mask_size))
      sizes.append(size)
    except DataError as error:
      problems.append(str(error))
  if problems:
    shown = "\n  ".join(problems[:20])
    raise DataError(f"{len(problems)} of {len(problems) + len(sizes)} examples cannot be used:\n  {shown}")
  return sizes, rules - {None}
