"""What the labels of a split hold, found by reading its examples."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from segjax.config import IGNORE_LABEL, ConfigError
from segjax.files import atomic
from segjax.input_pipeline import cache
from segjax.input_pipeline.images import DataError


def scan(
  source, indices, progress: str | None = None, border: bool = False
) -> tuple[np.ndarray, list[bytes | None], list[str]]:
  """Label counts per example, [len(indices), 256] int64; checksum of each image; and the problems met.

  An example that cannot be read has zeros and None.

  Args:
    progress: title of a progress bar, or None for none.
    border: whether instances are read too, for loss.border_weight.

  Raises:
    DataError: the source has no instances.
  """
  if border:
    source.border_files  # noqa: B018 - once, not for every example.

  def read(index):
    try:
      if border:
        source.border(int(index))
      image, label = source[int(index)]
    except DataError as error:
      return np.zeros(256, np.int64), None, str(error)
    if image.size and source.pixels.channels and (image == image[0, 0]).all():
      return (
        np.zeros(256, np.int64),
        None,
        f"{source.describe(int(index))}: all of its pixels are alike. Replace the image.",
      )
    checksum = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()
    return np.bincount(label.reshape(-1), minlength=256), checksum, None

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    seen = pool.map(read, indices)
    results = list(tqdm.tqdm(seen, progress, len(indices), unit=" images", disable=progress is None))
  counts, checksums, problems = zip(*results)
  return np.stack(counts), list(checksums), [problem for problem in problems if problem]


def cached_statistics(source, path: pathlib.Path) -> tuple[list[int], list[int]]:
  """`label_statistics`, kept in a JSON file.

  Raises:
    ConfigError: the file is damaged.
  """
  if path.exists():
    try:
      saved = json.loads(path.read_text())
      return list(saved["pixels"]), list(saved["images_with_class"])
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(f"{path}: damaged ({error}). Remove it: it is made again from the labels.") from error
  pixels, images_with_class = (counts.tolist() for counts in label_statistics(source))
  atomic.write_text(path, json.dumps(dict(pixels=pixels, images_with_class=images_with_class)))
  return pixels, images_with_class


def label_statistics(source) -> tuple[np.ndarray, np.ndarray]:
  """Over all labels: [K] pixels per class, and [K] valid pixels of the images that contain the class.

  Raises:
    DataError: the first example that cannot be read.
  """
  counts = _count(source, "class weights")
  return counts.sum(0), ((counts > 0) * counts.sum(1, keepdims=True)).sum(0)


def class_counts(source) -> np.ndarray:
  """[N, K] int64, the pixels of each class in each label, for data.sampling; kept in the user's cache folder.

  Raises:
    DataError: the first example that cannot be read.
    ConfigError: the cache folder cannot be made or trusted.
  """
  names, states = zip(*map(source.identity, range(len(source))))
  name = "|".join((*source.classes, *names))
  return cache.arrays("class_counts", name, " ".join(states), lambda: (_count(source, "class counts"),))[0]


def _count(source, progress: str) -> np.ndarray:
  counts, _, problems = scan(source, range(len(source)), progress)
  if problems:
    raise DataError(problems[0])
  return counts[:, : len(source.classes)]


def image_statistics(source, most_bad: int = 0) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and deviation of each channel over all pixels of a split, to nine digits, in the units of its files.

  In float64, image by image in their order (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance",
  equation 2.1), so that the result does not depend on the threads.

  Args:
    most_bad: how many examples may be unreadable; they are left out.

  Raises:
    DataError: more cannot be read, or a channel is the same everywhere.
  """

  def of_image(index):
    try:
      pixels = source[index][0].reshape(-1, source.pixels.count)
    except DataError as error:
      return error
    mean = pixels.mean(0, dtype=np.float64)
    return len(pixels), mean, np.square(pixels - mean).sum(0)

  bad, count, mean, squares = 0, 0, np.zeros(source.pixels.count), np.zeros(source.pixels.count)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for found in tqdm.tqdm(pool.map(of_image, range(len(source))), "mean, deviation", len(source), unit=" images"):
      if isinstance(found, DataError):
        bad += 1
        if bad > most_bad:
          raise found
        continue
      n, its_mean, its_squares = found
      total, apart = count + n, its_mean - mean
      mean = mean + apart * (n / total)
      squares, count = squares + its_squares + np.square(apart) * (count * n / total), total
  std = np.sqrt(squares / count)
  if not std.all():
    constant = np.flatnonzero(std == 0).tolist()
    raise DataError(
      f"Channels {constant} (from 0) are the same in all pixels of all {len(source)} images, so they tell nothing and have no"
      " deviation. Take them out of the files, or set data.mean and data.std."
    )
  return tuple(tuple(float(f"{x:.9g}") for x in values.tolist()) for values in (mean, std))


def share_table(source, counts: np.ndarray) -> str:
  """One line a class: name and share of all pixels; then void."""
  counts = counts.sum(0)
  width = max(len(name) for name in (*source.classes, "void"))
  rows = [*zip(source.classes, counts), ("void", counts[IGNORE_LABEL])]
  return "\n".join(f"  {name:<{width}} {100 * n / max(counts.sum(), 1):8.3f} %" for name, n in rows)


def warnings(source, counts: np.ndarray) -> list[str]:
  """What the labels show that is legal, and surely not meant."""
  counts, found = counts.sum(0), []
  if len(source.classes) == 2 and counts[0] and not counts[1] and counts[IGNORE_LABEL]:
    found.append(
      f"the masks hold 0 and 255, and 255 is void, so class {source.classes[1]!r} never occurs. If 255 means"
      f" {source.classes[1]!r}, set --config.data.label_map=255:1."
    )
  elif absent := [name for name, n in zip(source.classes, counts) if not n]:
    found.append(f"no pixel of {', '.join(absent)}. Check data.classes and data.label_map.")
  if counts.sum() and counts[IGNORE_LABEL] == counts.sum():
    found.append("every pixel is void. Check data.label_map.")
  return found


def probe(source, count: int = 16, border: bool = False, most_bad: int = 0) -> str:
  """Reads a few examples, spread over the split, and describes their labels; cheap enough for every start.

  Args:
    border: whether instances are read too, for loss.border_weight.
    most_bad: how many examples may be unreadable.

  Raises:
    DataError: more examples that cannot be read, or masks of 0 and 255 whose foreground would be ignored as void; with
      `border`, instances that are missing or cannot be read.
  """
  counts, _, problems = scan(source, np.unique(np.linspace(0, len(source) - 1, count).astype(int)), border=border)
  found = warnings(source, counts)
  if len(problems) > most_bad or any("255 is void" in w or "every pixel" in w for w in found):
    raise DataError("\n".join(problems or found))
  text = f"labels of {len(counts)} examples:\n{share_table(source, counts)}"
  found = [f"in these examples, {warning}" for warning in found] + problems
  return text + "".join(f"\n  note: {line}" for line in found)


def repeated(occurrences: Mapping[bytes, Sequence[tuple[str, str]]]) -> list[str]:
  """A line for each image that occurs several times.

  Args:
    occurrences: {checksum: (split, name) of each example}.
  """
  found = []
  for examples in occurrences.values():
    splits = dict.fromkeys(split for split, _ in examples)
    if len(examples) > 1:
      where = "in " + " and ".join(splits) if len(splits) > 1 else f"{len(examples)} times in {examples[0][0]}"
      why = "Scores would be of images that were trained on. " if len(splits) > 1 else ""
      names = ", ".join(dict.fromkeys(name for _, name in examples))
      found.append(f"the same image {where}: {names}. {why}Remove all but one of them.")
  return found
