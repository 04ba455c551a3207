"""Checks a data set before training on it: python -m segjax.check_data --config=configs/x.py

Reads every image and mask of the training and evaluation splits, prints class names with their share of the pixels,
and every problem with its file and remedy; where images have data.channels, also their mean and deviation. Images that are twice in a split, or in both, are problems too, and so is
what lies in the folders and is not used; hidden entries, notes and what no split names are only named. Exits with 1
where there is a problem.
"""

import collections
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from segjax import input_pipeline
from segjax.input_pipeline import DataError, images, inventory, scan
from segjax.run import commandline


class Split(NamedTuple):
  """What is in a split.

  Attributes:
    source: of its examples; None, and nothing else, where it cannot be opened or read at all.
    counts: [N, 256] label values of each example.
    checksums: of each image; None where the example cannot be read.
    problems: (number of its example, or None, text) of each.
  """

  source: object | None
  counts: np.ndarray | None
  checksums: list[bytes | None]
  problems: list[tuple[int | None, str]]


class Findings(NamedTuple):
  """What is in a data set: its splits; problems beside them; and what is only named."""

  splits: dict[str, Split]
  others: list[str]
  notes: list[str]


def examine(config, tell: Callable[[str, Split], None] = lambda name, split: None) -> Findings:
  """Reads both splits.

  Args:
    tell: called with each as soon as it is read.
  """
  splits, occurrences = {}, collections.defaultdict(list)
  for name in dict.fromkeys((config.data.train_split, config.data.eval_split)):
    splits[name] = split = _examine(config, name)
    for index, checksum in enumerate(split.checksums):
      if checksum:
        occurrences[checksum].append((name, split.source.describe(index)))
    tell(name, split)
  beside = inventory.unused({name: split.source for name, split in splits.items() if split.source is not None})
  lines = [(f"{images.printable(str(path))} is not used: {why}", bool(why.remedy)) for path, why in beside.items()]
  problems = [line for line, serious in lines if serious]
  return Findings(splits, problems + scan.repeated(occurrences), [line for line, serious in lines if not serious])


def _examine(config, name: str) -> Split:
  source = None
  try:
    source = input_pipeline.make_source(config.data, name)
    border = config.loss.border_weight > 0 and name == config.data.train_split
    counts, checksums, texts = scan.scan(source, range(len(source)), f"checking {name}", border)
  except DataError as error:
    return Split(None, None, [], [(None, str(error))])
  unread = [index for index, checksum in enumerate(checksums) if checksum is None]
  problems = list(zip(unread, texts)) + [(None, text) for text in scan.warnings(source, counts)]
  if not problems:  # Otherwise the canvas would raise the same errors again.
    try:
      input_pipeline.canvas_of(source, config.data)
    except DataError as error:
      problems.append((None, str(error)))
  return Split(source, counts, checksums, problems)


def check(config) -> int:
  """Reads both splits and prints what is found; returns the number of problems."""

  def tell(name: str, split: Split) -> None:
    source = split.source
    if source is not None:
      print(f"{name}: {len(source)} examples\n{scan.share_table(source, split.counts)}")
      for note in source.notes:
        print(f"  note: {note}")
      if not split.problems:
        print("  canvas {} x {} (height x width)".format(*input_pipeline.canvas_of(source, config.data)))
        if source.pixels.channels and name == config.data.train_split:
          print(_statistics(source))
    for _, problem in split.problems:
      print(f"  PROBLEM in {name}: {problem}")

  found = examine(config, tell)
  for problem in found.others:
    print(f"PROBLEM: {problem}")
  for note in found.notes:
    print(f"note: {note}")
  total = len(found.others) + sum(len(split.problems) for split in found.splits.values())
  print("no problems found" if not total else f"{total} problem(s) found")
  return total


def _statistics(source) -> str:
  mean, std = (",".join(map(repr, values)) for values in scan.image_statistics(source))
  return f"  mean and deviation, which a run measures too, and keeps: --config.data.mean={mean} --config.data.std={std}"


def main(argv: list[str]) -> None:
  """The command line."""
  del argv
  with commandline.readable_errors():
    sys.exit(1 if check(commandline.config()) else 0)


if __name__ == "__main__":
  commandline.run(main)
