"""Images of any number of channels, of 8 or 16 bits or floating point, as stored (`images.Pixels`): PNG, TIFF, NPY.

Which axis of a TIFF or an array is the channels follows from their number: the last one where it has that length, else the
first. What TIFFs say beside pixels is not used: a GeoTIFF's georeference, a value for "no data". Files that only hold RGB or
grey of 8 bits (JPEG, BMP, ...) are read as `images` does, as three channels or one.
"""

import contextlib
import functools
import pathlib
import struct
from collections.abc import Callable, Iterator

import numpy as np

from segjax.input_pipeline import images
from segjax.input_pipeline.images import DataError, Header, Reading

_INSTALL = "pip install 'segjax[rasters]'"
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # By its type of colour; 3 is a palette.
_MOST_PAGES = 4096  # Of a TIFF.
_ORIENTATION, _WHITE_IS_ZERO, _PALETTE = "Orientation", 0, 3  # Of TIFF.


def read_header(path: pathlib.Path, reading: Reading) -> Header:
  """The header of an image, without decoding, where `reading` has channels.

  Raises:
    DataError: missing, not an image, or one of other channels or another depth.
  """
  with _opened(path, reading) as (header, _):
    return header


def read(path: pathlib.Path, reading: Reading, mask_size: tuple[int, int] | None = None) -> np.ndarray:
  """An image [H, W, C] as `reading` says: RGB by `images.read_image`, or as stored, of its channels and depth.

  Args:
    mask_size: see `images.Header.must_turn`.

  Raises:
    DataError: what `read_header` and `images.read_image` raise, damaged files, and numbers that are not finite.
  """
  if not reading.channels:
    return images.read_image(path, exif=reading.exif, mask_size=mask_size)
  with _opened(path, reading) as (header, decode):
    stored = decode()
    axis = _channel_axis(path, stored.shape, reading.channels)
    pixels = stored[..., None] if axis is None else np.moveaxis(stored, axis, -1)
    if pixels.shape[:2] != header.size:
      raise DataError(f"{path}: holds {pixels.shape[:2]} pixels, its header says {header.size}. Replace the file.")
    if header.must_turn(reading.exif, mask_size):
      pixels = images.UPRIGHT[header.orientation](pixels)
    with np.errstate(over="ignore", invalid="ignore"):  # Not finite then, and so refused.
      pixels = np.ascontiguousarray(pixels, reading.depth)
  if pixels.dtype.kind == "f" and not (finite := np.isfinite(pixels)).all():
    raise DataError(
      f"{path}: {int((~finite).sum())} of its numbers are not finite (NaN or infinite in float32). Replace them by a number,"
      " and mark these pixels void (255) in the mask."
    )
  return pixels


@contextlib.contextmanager
def _opened(path: pathlib.Path, reading: Reading) -> Iterator[tuple[Header, Callable[[], np.ndarray]]]:
  """The header, compared with `reading`, and what decodes the pixels, [H, W] or with a channels' axis."""
  kind = path.suffix.lower()
  opened = dict(zip((".npy", ".tif", ".tiff", ".png"), (_npy, _tiff, _tiff, _png)))
  try:
    images.check_regular(path)
    with (opened[kind] if kind in opened else _picture)(path) as (shape, dtype, orientation, decode):
      axis = _channel_axis(path, shape, reading.channels)
      _check_depth(path, dtype, reading.depth)
      size = shape if axis is None else shape[:2] if axis else shape[1:]
      if size[0] * size[1] > images.MAX_PIXELS or 0 in size:
        raise DataError(f"{path}: claims {size[0]}x{size[1]} pixels. Cut it into parts, or replace it.")
      yield Header(path, tuple(size), orientation), decode
  except DataError:
    raise
  except FileNotFoundError as error:
    raise DataError(f"{path}: no such file. Restore it, or remove its name from the split.") from error
  except ImportError as error:
    raise DataError(f"{path}: reading it needs another library ({error}). {_INSTALL}") from error
  except Exception as error:  # Each of the decoders has its own.
    raise DataError(f"{path}: damaged or truncated ({error}). Replace the file, or remove it.") from error


def _channel_axis(path, shape: tuple[int, ...], channels: int) -> int | None:
  """Which axis is the channels: the last (2), or the first (0); None where there is none.

  Raises:
    DataError: another number of channels.
  """
  if len(shape) == 2 and channels == 1:
    return None
  if len(shape) == 3 and channels in (shape[2], shape[0]):
    return 2 if shape[2] == channels else 0
  found = f"{shape[2]} channels" if len(shape) == 3 else "1 channel" if len(shape) == 2 else f"{len(shape)} axes"
  raise DataError(
    f"{path}: {found}, shape {'x'.join(map(str, shape))}, but data.channels = {channels}. Set data.channels to what all"
    " images have, or correct the file."
  )


def _check_depth(path, dtype: np.dtype, depth: str) -> None:
  dtype = np.dtype(dtype)
  known = dtype.kind in "uif" and dtype.itemsize <= 8
  fits = dtype.name if dtype.name in ("uint8", "uint16") else "float32"
  if not known or fits != depth:
    remedy = f"Set data.depth={fits} if all images are so" if known else "Store whole or floating-point numbers"
    raise DataError(f"{path}: holds {dtype.name}, but data.depth = {depth}. {remedy}, or convert it.")


@contextlib.contextmanager
def _npy(path):
  array = np.load(path, mmap_mode="r", allow_pickle=False)
  yield array.shape, array.dtype, 1, lambda: array


@contextlib.contextmanager
def _tiff(path):
  import tifffile

  with tifffile.TiffFile(path, is_ome=False) as file:  # OME's XML may name other files.
    _check_pages(path, file)
    whole = [series for series in file.series if not (series.keyframe.is_reduced or series.keyframe.is_mask)]
    if len(whole) != 1:
      raise DataError(
        f"{path}: holds {len(whole)} images, of which one would be read. Store each in a file of its own."
      )
    page = whole[0].keyframe
    if page.photometric in (_WHITE_IS_ZERO, _PALETTE):
      raise DataError(f"{path}: its numbers are a palette's, or count from white to black. Store plain numbers.")
    orientation = page.tags[_ORIENTATION].value if _ORIENTATION in page.tags else 1
    yield whole[0].shape, whole[0].dtype, int(orientation), functools.partial(whole[0].asarray, maxworkers=1)


def _check_pages(path, file) -> None:
  """Raises DataError where pages follow each other in a circle, which tifffile would do without end, or are too many."""
  stream, form, seen, link = file.filehandle, file.tiff, set(), file.tiff.offsetsize
  while True:
    stream.seek(link)
    (offset,) = struct.unpack(form.offsetformat, stream.read(form.offsetsize))
    if not offset:
      return
    if offset in seen or len(seen) == _MOST_PAGES:
      raise DataError(f"{path}: its pages lead in a circle, or are more than {_MOST_PAGES}. Replace the file.")
    seen.add(offset)
    stream.seek(offset)
    (tags,) = struct.unpack(form.tagnoformat, stream.read(form.tagnosize))
    link = offset + form.tagnosize + tags * form.tagsize


@contextlib.contextmanager
def _png(path):
  import imagecodecs  # Pillow cuts colours of 16 bits to 8.

  with images.opened(path, None, "not a readable image") as picture:
    picture.fp.seek(16)
    width, height, bits, color = struct.unpack(">IIBB", picture.fp.read(10))
    if color not in _PNG_CHANNELS or bits < 8 or "transparency" in picture.info:
      raise DataError(
        f"{path}: a palette, fewer than 8 bits, or one colour made transparent. Store plain channels of 8 or 16 bits."
      )
    orientation = images.header_of(path, picture).orientation
  shape = (height, width, _PNG_CHANNELS[color])
  yield shape, np.dtype(f"uint{bits}"), orientation, lambda: imagecodecs.png_decode(path.read_bytes()).reshape(shape)


@contextlib.contextmanager
def _picture(path):
  with images.opened(path, None, "not a readable image") as picture:
    if images.is_deep(picture):
      raise DataError(f"{path}: {picture.format} of more than 8 bits. Store it as PNG, TIFF or NPY.")
    header, grey = images.header_of(path, picture), picture.mode == "L"
  decode = functools.partial(images.read_image, path, exif="ignore")
  yield (*header.size, 1 if grey else 3), np.uint8, header.orientation, lambda: decode()[..., :1] if grey else decode()
