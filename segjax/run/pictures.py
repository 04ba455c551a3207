"""Class ids and probabilities in colours, alone or over their images."""

import base64
import io

import numpy as np
from PIL import Image

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline.sources import datasets

MISTAKE_COLOR = (230, 0, 126)
PANEL = 512  # Pixels of the longer side of an image in `comparison`, at most.
FOREGROUND_COLOR = (0, 255, 0)  # Of overlays of two classes instead of their palette, which is often black.


def color_table(palette: np.ndarray) -> np.ndarray:
  """[256, 3] uint8, the colour of every label value: the classes' [K, 3], cream for void, black between them."""
  table = np.zeros((256, 3), np.uint8)
  table[: len(palette)], table[IGNORE_LABEL] = palette, datasets.VOID_COLOR
  return table


def heat_table() -> np.ndarray:
  """[256, 3] uint8, colours of rising brightness from black over blue, green and red to white, for probabilities.

  Cubehelix with its default numbers (Green 2011, "A colour scheme for the display of astronomical intensity images",
  section 3): the order is visible in grey prints too, and without telling red from green.
  """
  share = np.linspace(0, 1, 256)[:, None]
  angle = 2 * np.pi * (0.5 / 3 - 1.5 * share)
  cos, sin = np.cos(angle), np.sin(angle)
  turn = np.concatenate([-0.14861 * cos + 1.78277 * sin, -0.29227 * cos - 0.90649 * sin, 1.97294 * cos], axis=1)
  return np.round(255 * (share + share * (1 - share) / 2 * turn).clip(0, 1)).astype(np.uint8)


def indexed_image(values: np.ndarray, table: np.ndarray) -> Image.Image:
  """[H, W] uint8 as a palette image: it stores these numbers, and shows them in the colours of `table` [256, 3]."""
  image = Image.fromarray(values)
  image.putpalette(table.reshape(-1).tolist())  # Turns grey into indexed, with the same numbers.
  return image


def visible(image: np.ndarray) -> np.ndarray:
  """An image [H, W, C] of any depth for people, [H, W, 3] uint8: RGB of 8 bits as it is.

  Else its first three channels, or of fewer the first in grey, each from black at its 2nd percentile to white at its 98th.
  """
  if image.dtype == np.uint8 and image.shape[-1] == 3:
    return image
  shown = image[..., :3] if image.shape[-1] >= 3 else image[..., :1].repeat(3, -1)
  low, high = np.percentile(shown, (2, 98), axis=(0, 1))
  return np.round(255 * ((shown - low) / np.where(high > low, high - low, 1)).clip(0, 1)).astype(np.uint8)


def painted_colors(palette: np.ndarray) -> np.ndarray:
  """[256, 3] uint8, the colour in which `paint` shows every label value."""
  return color_table(palette if len(palette) > 2 else np.array([palette[0], FOREGROUND_COLOR]))


def paint(image: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """Class ids [H, W] over their image [H, W, 3] uint8, like it: the classes' colours over the faded image; void in cream.

  Of two classes only the second is painted, in green, and the image left as it is elsewhere, as for KITTI's road.
  """
  colors = painted_colors(palette)[classes]
  if len(palette) > 2:
    return _blend(image, colors, 65)
  return np.where((classes == 0)[..., None], image, _blend(image, colors, 50))


def _blend(image: np.ndarray, color: np.ndarray, percent: int) -> np.ndarray:
  return (((100 - percent) * image.astype(np.uint16) + percent * color.astype(np.uint16)) // 100).astype(np.uint8)


def data_uri(picture: Image.Image, *, lossless: bool) -> str:
  """A picture inside an HTML page: a PNG, or else a JPEG."""
  file, kind = io.BytesIO(), "png" if lossless else "jpeg"
  picture.save(file, kind, **({} if lossless else dict(quality=90, subsampling=0)))
  return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def overlay(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """image | label | prediction, the latter two painted over the image, side by side: [H, 3W, 3] uint8."""
  return np.concatenate([image, paint(image, label, palette), paint(image, prediction, palette)], axis=1)


def comparison(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """image | label | prediction | where it is wrong, side by side: [h, 4w, 3] uint8, made smaller to PANEL pixels.

  The last panel is the image in grey with the wrong pixels in magenta; void ones are not wrong.
  """
  grey = np.asarray(Image.fromarray(image).convert("L"))[..., None].repeat(3, -1) // 2 + 96
  wrong = np.where(((label != prediction) & (label != IGNORE_LABEL))[..., None], np.uint8(MISTAKE_COLOR), grey)
  panels = image, paint(image, label, palette), paint(image, prediction, palette), wrong
  made = [Image.fromarray(panel) for panel in panels]
  for panel in made:
    panel.thumbnail((PANEL, PANEL))
  return np.concatenate([np.asarray(panel) for panel in made], axis=1)
