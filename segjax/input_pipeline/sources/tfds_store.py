"""Examples stored by TensorFlow Datasets as ArrayRecord shards, read at random without TensorFlow.

TFDS parses the records; images stay encoded until `images` decodes them, as it does for files, so that the pixels do
not depend on the format.
"""

import io
import json
import os
import pathlib
import urllib.parse

import numpy as np
import tqdm

from segjax.files import atomic
from segjax.input_pipeline import cache, images, masks
from segjax.input_pipeline.images import DataError


class Records:
  """A store of image and mask features of a TFDS data set.

  The first use of a split reads all its records once, for their names and sizes, and keeps these in an index file
  beside the shards (in memory where that folder cannot be written).

  Args:
    dir: TFDS's data directory.
    dataset: "name" or "name/config", in its highest version there.
    splits: whose examples to join.
    image, mask: names of the features.
    id: feature to name and order examples by; empty: the order of the records.
    reading: how to read images and masks.

  Attributes:
    exif: the configured rule; the index keeps none that masks imply (see `base.Files`).

  Raises:
    DataError: no such data set, split or feature, another file format than ArrayRecord, or TFDS not installed.
  """

  def __init__(
    self, dir: str, dataset: str, splits: tuple[str, ...], *, image: str, mask: str, id: str, reading: images.Reading
  ):
    self._dataset, self._features, self._reading, self.exif = dataset, (image, mask), reading, reading.exif
    folder = _find_version(pathlib.Path(dir).expanduser(), dataset)
    builder = _open_builder(folder)
    for feature in filter(None, (image, mask, id)):
      if feature not in builder.info.features:
        raise DataError(
          f"{folder}: no feature {feature!r}; it has {', '.join(sorted(builder.info.features))}. Correct the name."
        )
    self._parts = [_open_split(builder, folder, split) for split in splits]
    shards = {pathlib.Path(path) for split in splits for path in builder.info.splits[split].filepaths}
    self.files, self.others = dict(image=[], shard=sorted(shards)), {}  # See `Source`.
    indices = [_index(folder, split, part, image, mask, id, reading) for split, part in zip(splits, self._parts)]
    rows = [(name, part, i) for part, index in enumerate(indices) for i, name in enumerate(index["names"])]
    if id:
      rows.sort()
    if not rows:
      raise DataError(f"{folder}: the split {'+'.join(splits)} is empty. Build the data set again.")
    self.names = [name for name, _, _ in rows]
    self._records = [(part, i) for _, part, i in rows]
    self.sizes = [tuple(indices[part]["sizes"][i]) for part, i in self._records]
    self._origins = [f"{os.path.abspath(folder)}|{split}|{image}|{mask}" for split in splits]
    self._state = " ".join(map(cache.file_state, sorted(folder.glob("*array_record*"))))

  def identity(self, index: int) -> tuple[str, str]:
    """See `Source.identity`: the number of its record, and all shards' sizes and times of change at the start."""
    part, number = self._records[index]
    return f"{self._origins[part]}|{number}", self._state

  def read(self, index: int) -> tuple[str, np.ndarray, str, np.ndarray]:
    """See `base.Files`."""
    part, number = self._records[index]
    record = _record(self._parts[part], number, self._dataset, self._features)
    image, mask = (io.BytesIO(record[feature]) for feature in self._features)
    where = [f"{self._dataset}: {feature} of {self.names[index]}" for feature in self._features]
    labels = masks.read_mask(where[1], mask, by_color=self._reading.by_color)
    pixels = images.read_image(where[0], image, exif=self._reading.exif, mask_size=labels.shape[:2])
    return where[0], pixels, where[1], labels


def _find_version(root: pathlib.Path, dataset: str) -> pathlib.Path:
  folders = [path.parent for path in (root / dataset).glob("*/dataset_info.json")]
  if not folders:
    raise DataError(
      f"{root / dataset}/VERSION/dataset_info.json: no such file, so TFDS's {dataset!r} is not in data.dir = {root}."
      " Build it there with file_format=array_record, e.g. with python -m segjax.prepare ... --tfds="
      f"{root}, or correct data.dir."
    )
  return max(folders, key=lambda path: [int(n) if n.isdecimal() else -1 for n in path.name.split(".")])


def _open_builder(folder: pathlib.Path):
  try:
    import tensorflow_datasets as tfds  # Takes a second; only this source needs it.
  except ImportError as error:
    raise DataError(f"Reading {folder} needs TFDS ({error}). Install it: pip install tensorflow-datasets.") from error
  try:
    return tfds.builder_from_directory(str(folder))
  except (ValueError, OSError, KeyError) as error:
    raise DataError(f"{folder}: not a TFDS data set that can be read ({error}). Build it again.") from error


def _open_split(builder, folder: pathlib.Path, split: str):
  import tensorflow_datasets as tfds

  features = builder.info.features
  encoded = {name: tfds.decode.SkipDecoding() for name in features if isinstance(features[name], tfds.features.Image)}
  try:
    return builder.as_data_source(split, decoders=encoded)
  except NotImplementedError as error:
    raise DataError(
      f"{folder} is stored as {builder.info.file_format.value}, which has no random access. Build it again with"
      " file_format=array_record."
    ) from error
  except (ValueError, KeyError) as error:
    known = ", ".join(builder.info.splits)
    raise DataError(f"{folder}: no split {split!r}; it has {known}. Correct the split.") from error


def _record(part, number: int, where: str, features) -> dict[str, bytes]:
  """A record by its number, its images encoded.

  Raises:
    DataError: it cannot be read, or lacks a feature.
  """
  try:
    record = part[number]
  except Exception as error:  # ArrayRecord and TFDS name no classes of their own.
    raise DataError(f"{where}: record {number} is damaged ({error}). Build the data set again.") from error
  if lost := [feature for feature in features if not record[feature]]:
    raise DataError(f"{where}: record {number} is damaged, without {', '.join(lost)}. Build the data set again.")
  return record


def _read_index(path: pathlib.Path, count: int) -> dict[str, list] | None:
  """What `_index` wrote, of `count` records; None where the file is missing, damaged or of other shards."""
  try:
    index = json.loads(path.read_text())
    names, sizes = index["names"], [(int(h), int(w)) for h, w in index["sizes"]]
    sound = len(names) == len(sizes) == count and all(isinstance(name, str) for name in names)
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None
  return dict(names=names, sizes=sizes) if sound and all(min(size) > 0 for size in sizes) else None


def _index(
  folder: pathlib.Path, split: str, part, image: str, mask: str, id: str, reading: images.Reading
) -> dict[str, list]:
  """{"names": [...], "sizes": [[h, w], ...]} of the records of a split, from its file or by reading them all.

  Raises:
    DataError: every image that cannot be read, and every mask of another size.
  """
  parts = (split, image, mask, id, "" if reading.exif == "refuse" else reading.exif)  # What sizes depend on.
  path = folder / f"segjax_index_{urllib.parse.quote('-'.join(filter(None, parts)), safe='-')}.json"
  if index := _read_index(path, len(part)):
    return index
  names, features = [], [feature for feature in (image, mask, id) if feature]

  def examples():
    what = f"indexing {folder.parent.name} {split}"
    for i in tqdm.tqdm(range(len(part)), what, unit=" images", disable=len(part) < 100):
      record = _record(part, i, f"{folder} {split}", features)
      names.append(record[id].decode(errors="surrogateescape") if id else f"{split}_{i:06d}")
      image_name, mask_name = (f"{folder}: {feature} of {names[-1]}" for feature in (image, mask))
      yield image_name, io.BytesIO(record[image]), mask_name, io.BytesIO(record[mask])

  sizes, _ = masks.read_sizes(examples(), reading)
  index = dict(names=names, sizes=sizes)
  try:
    atomic.write_text(path, json.dumps(index))
  except OSError:
    pass  # A read-only store: the next start reads the records again.
  return index
