"""Reading image files as they are stored, with errors that name the file and the remedy. Masks: masks.py.

One reader serves both loaders, so their pixels are the same by construction, and Pillow gives palette masks as
indices, where TensorFlow's PNG decoder would expand the palette to colours (class 1 would arrive as grey 38). JPEGs are
decoded by simplejpeg, to the same bits a sixth faster, because it also detects damage: Pillow ignores libjpeg's warnings,
and reads a file whose second half is zeros. What would reach the network altered (16-bit colours) or
in part (all frames but the first) is refused.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, TiffImagePlugin

try:  # Optional: 80 MB. PNGs of 8 bits are decoded to the same bits 1.2 to 1.7 times as fast (2048x1024: 35 ms, not 58).
  import imagecodecs
except ImportError:
  imagecodecs = None


class DataError(Exception):
  """Input that cannot be used; the message names the file, what is wrong with it, and the remedy."""

  def __str__(self) -> str:
    return super().__str__().encode(errors="backslashreplace").decode()  # Paths need not be UTF-8.


def printable(name: str) -> str:
  """A file's name for one line of UTF-8: line ends, control characters and what is no UTF-8 as Python escapes them."""
  return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda c: c[0].encode("unicode_escape").decode(), name)


# Formats that Pillow may open. It has dangerous ones: its EPS reader runs Ghostscript.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
JPEGS = ("JPEG", "MPO")  # An MPO is a photograph as JPEG, with more pictures behind it (depth, brightness, a preview).

# Height times width: a file of a few bytes may claim any size. 16384 x 16384 in RGB are 0.8 GB. Pillow would warn from 2^26 on.
MAX_PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# What EXIF calls the orientation of the stored pixels: how to stand them upright.
UPRIGHT = {
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.swapaxes(0, 1),
  6: lambda a: np.rot90(a, -1),
  7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
  8: np.rot90,
}
_ORIENTATION = 274  # The number of EXIF's field.
# How to treat an image that EXIF wants turned, where its mask's size does not show whether the mask was drawn on the
# turned image: refuse it, turn it as viewers do, or take the pixels as stored.
EXIF_RULES = ("refuse", "apply", "ignore")


def read_lines(path: pathlib.Path) -> list[str]:
  """The lines of a list file that hold anything, without the spaces around it.

  Raises:
    DataError: it cannot be read, or is not text.
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


def _ends_in_zeros(file: BinaryIO) -> bool:
  file.seek(file.seek(0, os.SEEK_END) * 3 // 4)
  return not any(file.read())


@contextlib.contextmanager
def opened(path: pathlib.Path | str, file: BinaryIO | None, failure: str) -> Iterator[ImageFile.ImageFile]:
  """The picture, its header read. What fails then, until it is closed, is a DataError that begins with `failure`."""
  try:
    if file is None:
      check_regular(path)
    if str(path).lower().endswith(".npy"):
      raise DataError(
        f"{path}: an array of NumPy, which is an image only where data.channels is set, and never a mask."
      )
    with Image.open(file or path, formats=FORMATS) as image:
      if image.width * image.height > MAX_PIXELS:
        raise DataError(
          f"{path}: claims {image.height}x{image.width} pixels, more than {MAX_PIXELS} in all. Cut it into parts, or"
          " replace it if that cannot be true."
        )
      if image.format not in JPEGS and getattr(image, "is_animated", False):  # Only some formats have the attribute.
        raise DataError(
          f"{path}: holds several frames or pages, of which only the first would be read. Store each in a file of its own."
        )
      if image.format == "WEBP" and _ends_in_zeros(image.fp):  # Its decoder takes them for pixels.
        raise DataError(f"{path}: damaged or truncated (its end was never written). Replace the file, or remove it.")
      yield image
  except DataError:
    raise
  except FileNotFoundError as error:
    raise DataError(f"{path}: no such file. Restore it, or remove its name from the split.") from error
  except Exception as error:  # Each of the decoders has its own.
    raise DataError(f"{path}: {failure} ({error}). Replace the file, or remove it.") from error


def storage(image: ImageFile.ImageFile) -> tuple[str, int]:
  """How samples are stored, in Pillow's words ("L;2": grey of 2 bits), and the number that PPM calls white, else 255.

  Only before the pixels are loaded.
  """
  decoder, _, _, args = image.tile[0] if image.tile else ("", None, 0, "")
  args = args if isinstance(args, tuple) else (args,)
  return str(args[0]), args[1] if decoder in ("ppm", "ppm_plain") and len(args) > 1 else 255


def is_deep(image: ImageFile.ImageFile) -> bool:
  """Whether stored samples have more than 8 bits, even where Pillow keeps only 8 of them."""
  mode, white = storage(image)
  if image.format == "TIFF" and TiffImagePlugin.BITSPERSAMPLE in image.tag_v2:
    bits = max(image.tag_v2[TiffImagePlugin.BITSPERSAMPLE])
  else:
    bits = 16 if image.format == "PNG" and ";16" in mode else 8
  return image.mode.startswith(("I", "F")) or white > 255 or bits > 8


@dataclasses.dataclass(frozen=True)
class Pixels:
  """What the pixels of a data set's images hold.

  Attributes:
    channels: of each image file: PNG, TIFF (GeoTIFF, without its georeference) or NPY, as stored, see `rasters`. 0: RGB of 8
      bits, which files of other kinds are converted to.
    depth: of the numbers in them, where `channels` is set: "uint8", "uint16", or "float32", which other numbers are rounded
      to. Files of another depth are refused.
    mean, std: of each channel, in the files' units; images are standardised by them instead of the model's own numbers. ():
      measured in the training images when a run begins, and kept in the run's config.
  """

  channels: int = 0
  depth: str = "uint8"
  mean: tuple = ()
  std: tuple = ()

  @property
  def count(self) -> int:
    """Channels of a batch."""
    return self.channels or 3

  @property
  def dtype(self) -> np.dtype:
    """Of a batch."""
    return np.dtype(self.depth if self.channels else "uint8")

  @property
  def bytes(self) -> int:
    """That a pixel takes with its label."""
    return self.count * self.dtype.itemsize + 1

  @property
  def statistics(self) -> tuple[tuple, tuple] | None:
    """(mean, std) in place of the model's own; None for its own. Where none are measured yet, 0 and 1: for shapes alone."""
    if not self.channels:
      return None
    return tuple(self.mean) or (0.0,) * self.channels, tuple(self.std) or (1.0,) * self.channels


RGB = Pixels()


def pixels_of(data) -> Pixels:
  """From `config.data`; of a source that has RGB alone, `RGB`."""
  return Pixels(**{field.name: data[field.name] for field in dataclasses.fields(Pixels)}) if "channels" in data else RGB


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a store reads its files.

  Attributes:
    exif: one of `EXIF_RULES`.
    by_color: whether palette masks are read as the colours that they show, instead of as numbers.
    same_colors: numbers whose colours must agree in all palettes of a split.
    channels, depth: of images, see `Pixels`.
  """

  exif: str = "refuse"
  by_color: bool = False
  same_colors: Sequence[int] = ()
  channels: int = 0
  depth: str = "uint8"


@dataclasses.dataclass(frozen=True)
class Header:
  """What an image's header says.

  Attributes:
    size: (H, W) as stored.
    orientation: EXIF's, 1 to 8; 1 is upright. (A TIFF's is part of its format, and Pillow turns it.)
  """

  path: pathlib.Path | str
  size: tuple[int, int]
  orientation: int

  def rule_by(self, mask_size: tuple[int, int] | None) -> str | None:
    """The rule for EXIF (see `Reading.exif`) that the mask's size implies; None where it implies none."""
    turned = self._turned()
    if mask_size is None or turned == self.size:
      return None
    return {self.size: "ignore", turned: "apply"}.get(mask_size)

  def must_turn(self, exif: str, mask_size: tuple[int, int] | None) -> bool:
    """Whether to stand the pixels upright.

    Args:
      exif: of `Reading`, where the mask's size implies no rule.
      mask_size: (H, W); None without a mask.

    Raises:
      DataError: neither mask nor `exif` decides.
    """
    if self.orientation == 1:
      return False
    rule = self.rule_by(mask_size) or exif
    if rule == "refuse":
      drawn = "the mask's size does not tell which of the two it was drawn on" if mask_size else "no mask tells"
      raise DataError(
        f"{self.path}: EXIF gives it orientation {self.orientation}, so viewers show it turned, and {drawn}. Set"
        " --config.data.exif=apply to turn such images as viewers do, or --config.data.exif=ignore to take pixels as stored."
      )
    return rule == "apply"

  def size_by(self, exif: str, mask_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(H, W) as `read_image` gives it; arguments and errors: see `must_turn`."""
    return self._turned() if self.must_turn(exif, mask_size) else self.size

  def _turned(self) -> tuple[int, int]:
    return self.size[::-1] if self.orientation >= 5 else self.size


def header_of(path: pathlib.Path | str, image: ImageFile.ImageFile) -> Header:
  """The header of an opened image; an orientation that EXIF does not know, or cannot be read, is 1 (upright)."""
  orientation = 1
  if "exif" in image.info and image.format != "TIFF":
    try:
      orientation = image.getexif()[_ORIENTATION] if _ORIENTATION in image.getexif() else 1
    except Exception:  # Unreadable EXIF turns nothing in viewers either; Pillow raises whatever its parser meets.
      orientation = 1
  return Header(path, (image.height, image.width), orientation if orientation in UPRIGHT else 1)


def read_header(path: pathlib.Path | str, file: BinaryIO | None = None) -> Header:
  """The header of an image, without decoding; arguments: see `read_image`.

  Raises:
    DataError: missing, not an image, one of several frames, or of more than `MAX_PIXELS`, which none of these functions
      reads.
  """
  with opened(path, file, "not a readable image") as image:
    return header_of(path, image)


def read_size(path: pathlib.Path | str, file: BinaryIO | None = None) -> tuple[int, int]:
  """(H, W) as stored; arguments and errors: see `read_header`."""
  return read_header(path, file).size


def _decode_jpeg(image: ImageFile.ImageFile) -> np.ndarray:
  """[H, W, 3] uint8; raises ValueError on any of libjpeg's warnings, each of which means damage."""
  image.fp.seek(0)
  data = image.fp.read()
  try:
    simplejpeg.decode_jpeg_header(data)
  except ValueError:  # Rare ways to store colours at less resolution, which it does not know.
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):  # The end of the image, and the last begin of pixels.
      raise
  else:
    pixels = simplejpeg.decode_jpeg(data, "CMYK" if image.mode == "CMYK" else "RGB", strict=True)
    if image.mode != "CMYK":
      return pixels
  return np.asarray(image.convert("RGB"))  # It cannot turn inks into colours.


def decode(image: ImageFile.ImageFile) -> np.ndarray:
  """[H, W] or [H, W, C], as stored."""
  plain = image.mode in ("L", "RGB") and storage(image)[0] == image.mode
  if imagecodecs and image.format == "PNG" and plain and not {"transparency", "interlace"} & image.info.keys():
    image.fp.seek(0)
    return imagecodecs.spng_decode(image.fp.read())
  image.load()
  return np.asarray(image)


def read_image(
  path: pathlib.Path | str, file: BinaryIO | None = None, *, exif: str = "refuse", mask_size: tuple | None = None
) -> np.ndarray:
  """[H, W, 3] uint8 RGB. Grey becomes three equal channels; transparency is dropped.

  Args:
    path: of the file, or its name in messages where `file` holds the bytes.
    file: an open file, for images inside other files.
    exif, mask_size: see `Header.must_turn`.

  Raises:
    DataError: missing, damaged, one of several frames, with more than 8 bits per channel, which RGB conversion would
      clip, or turned by EXIF where it is not known whether its mask is.
  """
  with opened(path, file, "damaged or truncated") as image:
    if is_deep(image):
      raise DataError(
        f"{path}: its {image.mode} pixels have more than 8 bits per channel. Convert the image to 8 bits, or, of your own"
        " folders, set data.channels and data.depth."
      )
    header = header_of(path, image)
    turn = header.must_turn(exif, mask_size)
    if image.format in JPEGS:
      pixels = _decode_jpeg(image)
    else:
      pixels = decode(image) if image.mode == "RGB" else np.asarray(image.convert("RGB"))
    return np.ascontiguousarray(UPRIGHT[header.orientation](pixels)) if turn else pixels


def listed(names) -> str:
  """The first ten names, and how many more there are."""
  names = list(names)
  return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
