"""Looking at a data set before training on it: python -m segjax.check_data --config=configs/x.py

Reads every image and mask of the training and evaluation splits, prints class names with their share of the pixels,
and every problem with its file and remedy. Images that are twice in a split, or in both, are problems too, and so is
what lies in the folders and is not used; hidden entries, notes and what no split names are only named. Exits with 1
where there is a problem.
"""

import collections
import concurrent.futures
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from segjax import commandline, input_pipeline
from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import DataError, images, inventory


def scan(source, indices, progress: str | None = None, border: bool = False) -> tuple[np.ndarray, list[str]]:
  """Label counts per example, [len(indices), 256] int64 (zeros where it cannot be read), and the problems met.

  Args:
    progress: title of a progress bar, or None for none.
    border: whether instances are read too, for loss.border_weight.

  Raises:
    DataError: the source has no instances.
  """
  counts, _, problems = _scan(source, indices, progress, border)
  return counts, problems


def _scan(source, indices, progress, border) -> tuple[np.ndarray, list[bytes | None], list[str]]:
  """`scan`, and each image's checksum between its results: None where it cannot be read."""
  if border:
    source.border_files  # noqa: B018 - once, not for every example.

  def look(index):
    try:
      if border:
        source.border(int(index))
      image, label = source[int(index)]
    except DataError as error:
      return np.zeros(256, np.int64), None, str(error)
    checksum = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()
    return np.bincount(label.reshape(-1), minlength=256), checksum, None

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = list(tqdm.tqdm(pool.map(look, indices), total=len(indices), desc=progress, disable=progress is None))
  counts, checksums, problems = zip(*results)
  return np.stack(counts), list(checksums), [problem for problem in problems if problem]


def label_statistics(source) -> tuple[np.ndarray, np.ndarray]:
  """Over all labels: [K] pixels per class, and [K] valid pixels of the images that contain the class.

  Raises:
    DataError: the first example that cannot be read.
  """
  counts, problems = scan(source, range(len(source)), "class weights")
  if problems:
    raise DataError(problems[0])
  counts = counts[:, : len(source.classes)]
  return counts.sum(0), ((counts > 0) * counts.sum(1, keepdims=True)).sum(0)


def share_table(source, counts: np.ndarray) -> str:
  """One line a class: name and share of all pixels; then void."""
  counts = counts.sum(0)
  width = max(len(name) for name in (*source.classes, "void"))
  rows = [*zip(source.classes, counts), ("void", counts[IGNORE_LABEL])]
  return "\n".join(f"  {name:<{width}} {100 * n / max(counts.sum(), 1):8.3f} %" for name, n in rows)


def warnings(source, counts: np.ndarray) -> list[str]:
  """What is legal and yet surely unintended, seen in the labels."""
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
  counts, problems = scan(source, np.unique(np.linspace(0, len(source) - 1, count).astype(int)), border=border)
  found = warnings(source, counts)
  if len(problems) > most_bad or any("255 is void" in w or "every pixel" in w for w in found):
    raise DataError("\n".join(problems or found))
  text = f"labels of {len(counts)} examples:\n{share_table(source, counts)}"
  found = [f"in these examples, {warning}" for warning in found] + problems
  return text + "".join(f"\n  note: {line}" for line in found)


def repeated(places: Mapping[bytes, Sequence[tuple[str, str]]]) -> list[str]:
  """A line for each image that occurs several times.

  Args:
    places: {checksum: (split, name) of each example}.
  """
  found = []
  for examples in places.values():
    splits = dict.fromkeys(split for split, _ in examples)
    if len(examples) > 1:
      where = "in " + " and ".join(splits) if len(splits) > 1 else f"{len(examples)} times in {examples[0][0]}"
      why = "Scores would be of images that were trained on. " if len(splits) > 1 else ""
      names = ", ".join(dict.fromkeys(name for _, name in examples))
      found.append(f"the same image {where}: {names}. {why}Remove all but one of them.")
  return found


def check(config) -> int:
  """Scans both splits and prints what it finds; returns the number of problems."""
  total, sources, places = 0, {}, collections.defaultdict(list)
  for split in dict.fromkeys((config.data.train_split, config.data.eval_split)):
    try:
      source = input_pipeline.make_source(config.data, split)
      border = config.loss.border_weight > 0 and split == config.data.train_split
      counts, checksums, found = _scan(source, range(len(source)), split, border)
      sources[split] = source
      for index, checksum in enumerate(checksums):
        if checksum:
          places[checksum].append((split, source.describe(index)))
      found += warnings(source, counts)
      print(f"{split}: {len(source)} examples\n{share_table(source, counts)}")
      for note in source.notes:
        print(f"  note: {note}")
      if not found:  # Otherwise it would tell the same again.
        print("  canvas {} x {} (height x width)".format(*input_pipeline.canvas_of(source, config.data)))
    except DataError as error:
      found = [str(error)]
    for problem in found:
      print(f"  PROBLEM in {split}: {problem}")
    total += len(found)
  beside = inventory.unused(sources)
  for path, why in beside.items():
    print(f"{'PROBLEM: ' if why.remedy else 'note: '}{images.printable(str(path))} is not used: {why}")
  twice = repeated(places)
  for problem in twice:
    print(f"PROBLEM: {problem}")
  total += len(twice) + sum(bool(why.remedy) for why in beside.values())
  print("no problems found" if not total else f"{total} problem(s) found")
  return total


def main(argv: list[str]) -> None:
  """The command line."""
  del argv
  with commandline.readable_errors():
    sys.exit(1 if check(commandline.config()) else 0)


if __name__ == "__main__":
  commandline.run(main)
