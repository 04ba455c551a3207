"""Checks a data set before training on it: python -m segjax.check_data --config=configs/x.py

Reads every image and mask of the training and evaluation splits, prints class names with their share of the pixels,
and every problem with its file and remedy; where images have data.channels, also their mean and deviation. Images that are twice in a split, or in both, are problems too, and so is
what lies in the folders and is not used; hidden entries, notes and what no split names are only named. Exits with 1
where there is a problem.
"""

import collections
import sys

from segjax import input_pipeline
from segjax.input_pipeline import DataError, images, inventory, scan
from segjax.run import commandline


def check(config) -> int:
  """Scans both splits and prints what it finds; returns the number of problems."""
  total, sources, occurrences = 0, {}, collections.defaultdict(list)
  for split in dict.fromkeys((config.data.train_split, config.data.eval_split)):
    try:
      source = input_pipeline.make_source(config.data, split)
      border = config.loss.border_weight > 0 and split == config.data.train_split
      counts, checksums, found = scan.scan(source, range(len(source)), f"checking {split}", border)
      sources[split] = source
      for index, checksum in enumerate(checksums):
        if checksum:
          occurrences[checksum].append((split, source.describe(index)))
      found += scan.warnings(source, counts)
      print(f"{split}: {len(source)} examples\n{scan.share_table(source, counts)}")
      for note in source.notes:
        print(f"  note: {note}")
      if not found:  # Otherwise the canvas would raise the same errors again.
        print("  canvas {} x {} (height x width)".format(*input_pipeline.canvas_of(source, config.data)))
        if source.pixels.channels and split == config.data.train_split:
          print(_statistics(source))
    except DataError as error:
      found = [str(error)]
    for problem in found:
      print(f"  PROBLEM in {split}: {problem}")
    total += len(found)
  beside = inventory.unused(sources)
  for path, why in beside.items():
    print(f"{'PROBLEM: ' if why.remedy else 'note: '}{images.printable(str(path))} is not used: {why}")
  twice = scan.repeated(occurrences)
  for problem in twice:
    print(f"PROBLEM: {problem}")
  total += len(twice) + sum(bool(why.remedy) for why in beside.values())
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
