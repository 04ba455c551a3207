"""What all sources of images and label files share: examples from a store, checked and turned into class ids.

A store holds one split's raw images and label masks: `Files` on a file system, `tfds_store.Records` in TFDS's shards. A source
adds what the numbers in the masks mean.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import cache, images, inventory, masks, rasters
from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources import datasets


class Files:
  """A store of image and mask files.

  Args:
    names: of the examples, for messages and pictures.
    pairs: (image, mask) paths; mask None where the split has no labels.
    reading: how to read them.
    others: () -> what else lies in their folders; see `inventory.search`.
  """

  def __init__(
    self,
    names: Sequence[str],
    pairs: Sequence[tuple[pathlib.Path, pathlib.Path | None]],
    reading: images.Reading,
    others: Callable[[], dict[pathlib.Path, inventory.Unused]],
  ):
    self.names = list(names)
    self._pairs = list(pairs)
    self._reading, self._others = reading, others

  @functools.cached_property
  def others(self) -> dict[pathlib.Path, inventory.Unused]:
    """See `Source.others`."""
    return self._others()

  @property
  def files(self) -> dict[str, list[pathlib.Path]]:
    """See `Source.files`."""
    return dict(image=[image for image, _ in self._pairs], mask=[mask for _, mask in self._pairs if mask])

  @functools.cached_property
  def sizes(self) -> list[tuple[int, int]]:
    """(h, w) of each image; reads all headers.

    Raises:
      DataError: every unreadable header, and every mask of another size than its image.
    """
    return self._headers[0]

  @property
  def exif(self) -> str:
    """The EXIF rule for images without a mask, see `images.Reading.exif`: that of this split's masks where they agree,
    else the configured one.
    """
    rules = self._headers[1]
    return next(iter(rules)) if len(rules) == 1 else self._reading.exif

  @functools.cached_property
  def _headers(self) -> tuple[list[tuple[int, int]], set[str]]:
    """See `masks.read_sizes`."""
    return masks.read_sizes(((image, None, mask, None) for image, mask in self._pairs), self._reading)

  def identity(self, index: int) -> tuple[str, str]:
    """See `Source.identity`: the paths of its files, their sizes and times of change, and how they are read."""
    paths = [os.path.abspath(path) for path in self._pairs[index] if path is not None]
    return "|".join([*paths, repr(self._reading)]), " ".join(map(cache.file_state, paths))

  def read(self, index: int) -> tuple[str, np.ndarray, str, np.ndarray | None]:
    """Image's path and pixels [H, W, C], mask's path and stored numbers [H, W] (RGB: [H, W, 3]) or None."""
    image_path, mask_path = self._pairs[index]
    mask = masks.read_mask(mask_path, by_color=self._reading.by_color) if mask_path else None
    mask_size = None if mask is None else mask.shape[:2]
    image = rasters.read(image_path, self._reading, mask_size)
    return str(image_path), image, str(mask_path), mask


class Source:
  """Random access to the examples of a store, whose images are as `pixels` says.

  Args:
    store: `Files` or `tfds_store.Records`.
    classes: names in the order of ids.
    palette: [K, 3] uint8.
    to_label: (mask's path, stored numbers) -> [H, W] uint8 class ids, 255 = void; raises DataError for others.
    meaning: what `to_label` makes of a mask, where options decide that: other text for other labels.
    labelled: False where the split has no public labels; they then read as void everywhere.
    notes: what a user should know about this split, e.g. that it is not complete.
    submission: how predictions are written.
  """

  pixels = images.RGB

  def __init__(
    self,
    store,
    classes: Sequence[str],
    palette: np.ndarray,
    to_label: Callable,
    *,
    meaning: str = "",
    labelled: bool = True,
    notes: Sequence[str] = (),
    submission: datasets.Submission = datasets.PLAIN_SUBMISSION,
  ):
    self._store, self._to_label, self._meaning = store, to_label, meaning
    self.kept = {}  # {index: (state, example)} of `cache.Cached`.
    self.classes, self.palette = tuple(classes), palette
    self.labelled, self.notes, self.submission = labelled, tuple(notes), submission

  def __len__(self) -> int:
    return len(self._store.names)

  @property
  def sizes(self) -> list[tuple[int, int]]:
    """(h, w) of every image of the split.

    Raises:
      DataError: every image that cannot be used, and every mask of another size than its image.
    """
    return self._store.sizes

  @property
  def canvas_size(self) -> tuple[int, int]:
    """(H, W) that holds every image; raises as `sizes`."""
    return max(h for h, _ in self.sizes), max(w for _, w in self.sizes)

  def identity(self, index: int) -> tuple[str, str]:
    """What example `index` is made from and how, and the state that this is in: where both are the same, so are its pixels.

    Raises:
      DataError: its files are gone.
    """
    name, state = self._store.identity(index)
    return f"{name}|{self._meaning}|{self.labelled}", state

  @property
  def exif(self) -> str:
    """The EXIF rule for images without a mask: "refuse", "apply" or "ignore"; see `Files.exif`."""
    return self._store.exif

  @property
  def others(self) -> dict[pathlib.Path, inventory.Unused]:
    """What lies in the split's folders beside its own files, and why it is not used; may be another split's (`inventory.unused`).

    Raises:
      DataError: a folder that may not be read.
    """
    return self._store.others

  def files(self, border: bool = False) -> dict[str, list[pathlib.Path]]:
    """The files that are read: {"image": one for each example, "mask": likewise, or none}, or {"image": [], "shard": ...}.

    Args:
      border: adds "instances", what `border` reads.
    """
    return self._store.files

  def describe(self, index: int) -> str:
    """The example's name, as `images.printable` has it."""
    return images.printable(self._store.names[index])

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """image [H, W, C] as of `pixels` (RGB: [H, W, 3] uint8), label [H, W] uint8, ids in [0, len(classes)) or 255.

    Raises:
      DataError: damaged files, other label values or colours, an image and a mask of different sizes.
    """
    image_path, image, mask_path, mask = self._store.read(index)
    if mask is None or not self.labelled:
      return image, np.full(image.shape[:2], IGNORE_LABEL, np.uint8)
    label = self._to_label(mask_path, mask)
    if image.shape[:2] != label.shape:
      raise DataError(masks.size_problem(image_path, image.shape[:2], mask_path, label.shape))
    return image, label


def count_note(split: str, count: int, official: int) -> list[str]:
  """A note where a benchmark's split is not the official one, whose scores would not compare."""
  return [] if count == official else [f"split {split!r} has {count} images, the official one {official}"]


def find_folder(dir: str, names: Sequence[str], *, holds: str, archive: str) -> pathlib.Path:
  """A benchmark's folder: `dir`, or one of `names` below it, whichever holds the folder `holds`.

  Args:
    archive: that unpacks to it, for the message.

  Raises:
    DataError: there is none.
  """
  given = pathlib.Path(dir).expanduser()
  for root in (given, *(given / name for name in names)):
    if (root / holds).is_dir():
      return root
  raise DataError(
    f"data.dir = {dir}: no folder {holds} there, nor in {' or '.join(names)} below it. Name the folder {names[0]} that"
    f" {archive} unpacks to."
  )
