"""Keeps what a training reached, and prints the tables of it: benchmarks/results.md holds them.

python benchmarks/results.py keep RUN --commit=COMMIT --note="2 CPU cores, other work beside it"
python benchmarks/results.py table

`keep` copies a workdir's metrics.jsonl and config.json to benchmarks/results/NAME, with the data set's folder taken out of the
latter, and the run's number of steps, commit and note to run.json.
"""

import argparse
import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "results"
# Of data sets of which only a part is there: the classes over which the mean is.
CLASSES = {"voc_part": ("background", "cat", "cow", "dog", "horse", "person", "sheep")}


def lines(run: pathlib.Path) -> list[dict]:
  """Of metrics.jsonl, in their order."""
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations(run: pathlib.Path) -> list[dict]:
  """{"step", score: value} of each evaluation, without the split's name before the scores."""
  split = json.loads((run / "config.json").read_text())["data"]["eval_split"]
  found = [line for line in lines(run) if any(name.startswith(f"{split}/") for name in line)]
  return [{name.removeprefix(f"{split}/"): value for name, value in line.items()} for line in found]


def score(run: pathlib.Path) -> tuple[str, float, int]:
  """What a run is judged by, its value and the step of it: the last evaluation's mean IoU, or the best foreground IoU of the
  runs that stop by it."""
  found, config = evaluations(run), json.loads((run / "config.json").read_text())
  last = found[-1]
  if config["head"] == "sigmoid":
    if config["policy"]["early_stop"]:
      last = max(found, key=lambda scores: scores["foreground_iou"])
    return "foreground IoU", last["foreground_iou"], last["step"]
  for data, classes in CLASSES.items():
    if run.name.startswith(data):
      return f"mean IoU of {len(classes)} classes", float(np.mean([last[f"iou/{c}"] for c in classes])), last["step"]
  return "mean IoU", last["mean_iou"], last["step"]


def minutes(run: pathlib.Path) -> float:
  """That the steps took, without evaluations and the start."""
  total, before = 0.0, 0
  for line in lines(run):
    if "train/step_time_ms" in line:
      total += (line["step"] - before) * line["train/step_time_ms"] / 60e3
      before = line["step"]
  return total


def row(run: pathlib.Path) -> str:
  """A run's row of the table."""
  config, about = json.loads((run / "config.json").read_text()), json.loads((run / "run.json").read_text())
  name, value, step = score(run)
  return (
    f"| [`{run.name}`](results/{run.name}) | {name} {value:.3f} | {step} of {config['num_steps']}, {config['batch_size']} images |"
    f" {config['seed']} | {minutes(run):.0f} | {about['note']} | {about['commit'][:7]} |"
  )


def table() -> str:
  """All runs."""
  head = (
    "| run | val score | step, batch | seed | minutes of training | hardware | commit |\n|---|---|---|---|---|---|---|"
  )
  return "\n".join([head, *(row(run) for run in sorted(FOLDER.iterdir()))])


def class_table(data: str) -> str:
  """The IoU of each of the `CLASSES` in the runs on one of these data sets, in per cent."""
  names, classes = [run.name for run in sorted(FOLDER.iterdir()) if run.name.startswith(data)], CLASSES[data]
  columns = [evaluations(FOLDER / name)[-1] for name in names]
  cell = lambda scores, c: "-" if scores[f"iou/{c}"] is None else f"{100 * scores[f'iou/{c}']:.1f}"  # noqa: E731
  rows = [f"| {c} | {' | '.join(cell(scores, c) for scores in columns)} |" for c in classes]
  return "\n".join([f"| class | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|", *rows])


def keep(run: pathlib.Path, commit: str, note: str) -> None:
  """Copies what is committed of a workdir."""
  folder = FOLDER / run.name
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
  config = json.loads((run / "config.json").read_text())
  config["data"]["dir"] = "DATA"
  config["init"]["path"] = pathlib.Path(config["init"]["path"]).name
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  (folder / "run.json").write_text(json.dumps(dict(commit=commit, note=note), indent=2) + "\n")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("action", choices=("keep", "table"))
  parser.add_argument("runs", nargs="*", type=pathlib.Path, help="workdirs to keep")
  parser.add_argument("--commit", help="that the runs trained with")
  parser.add_argument("--note", help="the hardware, and what else ran on it")
  args = parser.parse_args()
  if args.action == "keep":
    if not args.runs or not args.commit or not args.note:
      parser.error("keep needs runs, --commit and --note")
    for run in args.runs:
      keep(run, args.commit, args.note)
  else:
    print("\n\n".join([table(), *map(class_table, CLASSES)]))


if __name__ == "__main__":
  main()
