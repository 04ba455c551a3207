"""What an evaluation leaves: scalars, pictures, and one JSON file with the counts of the split and where they come from."""

import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import pathlib
import platform
import shlex
import subprocess
import sys

import jax
import numpy as np

import segjax
from segjax import config as config_lib
from segjax import metrics
from segjax.files import atomic
from segjax.input_pipeline import images
from segjax.run import outputs
from segjax.run.evaluation import Evaluation
from segjax.run.report import Writer

FOLDER = "evaluations"  # In the workdir, or in its eval_SPLIT.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def write(writer: Writer, step: int, evaluation: Evaluation) -> None:
  """Writes all of an evaluation: to metrics.jsonl, overlays/ and evaluations/ of the writer's folder, and to its trackers."""
  writer.scalars(step, evaluation.scalars)
  places = {"worst": itertools.count(1), "median": itertools.count(1)}
  named = {f"{example.rank}/{next(places[example.rank])}": example.picture for example in evaluation.examples}
  writer.pictures(step, evaluation.pictures)
  folder, files = writer.pictures(step, named, FOLDER).relative_to(writer.folder), outputs.flat_names(named, ".png")
  if writer.writes:
    _save(writer.folder, step, evaluation, [(folder / files[name]).as_posix() for name in named])


def _save(folder: pathlib.Path, step: int, evaluation: Evaluation, pictures: list[str]) -> None:
  """Writes `folder`/evaluations/step_N.json, whole or not at all.

  Its counts are integers: `confusion` [K, K], rows = label; `boundary` [3, K] and `reliability` as of metrics.py.

  Args:
    pictures: paths relative to `folder`, of the evaluation's `examples`.
  """
  totals, source = evaluation.totals, evaluation.source
  found = [metrics.scores(totals.confusion), metrics.boundary_scores(totals.boundary), totals.images.scores()]
  calibration = metrics.calibration(totals.reliability)
  content = dict(
    step=step,
    split=evaluation.config.data.eval_split,
    images=totals.images.count,
    scores=evaluation.scalars,
    classes=source.classes,
    colors=[bytes(color).hex() for color in source.palette],
    per_class={name.removesuffix("_per_class"): x for part in found for name, x in part.items() if np.ndim(x)},
    confusion=totals.confusion,
    boundary=totals.boundary,
    reliability={name: calibration[name] for name in ("count", "accuracy", "confidence")},
    examples=[
      dict(rank=example.rank, name=images.printable(example.name), iou=example.iou, picture=picture)
      for example, picture in zip(evaluation.examples, pictures)
    ],
    config=config_lib.fields(evaluation.config),
    **origin(),
  )
  path = folder / FOLDER / f"step_{step:06d}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_text(path, json.dumps(_plain(content)) + "\n")


def newest(folder: pathlib.Path) -> dict | None:
  """What `write` left last in `folder`, with its `time` in seconds since 1970; None where it has nothing."""
  paths = {path: path.stat().st_mtime for path in (folder / FOLDER).glob("step_*.json")}
  if not paths:
    return None
  path = max(paths, key=paths.get)
  return json.loads(path.read_text()) | dict(time=paths[path])


def origin() -> dict:
  """Date, command, commit, versions and devices of this process."""
  return dict(
    date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    command=shlex.join(sys.orig_argv),
    commit=_commit(),
    versions=dict(segjax=segjax.__version__, python=platform.python_version()) | _versions(),
    devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)",
  )


@functools.cache
def _versions() -> dict[str, str]:
  installed = importlib.metadata.distributions()  # A tenth of a second.
  return {package.name: package.version for package in installed if package.name in _PACKAGES}


@functools.cache
def _commit() -> str:
  """Of the checkout that this is, with "-dirty" where files were changed; "" where it is none, or git is not there."""
  root = pathlib.Path(segjax.__file__).parents[1]
  if not (root / ".git").exists():
    return ""
  command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return ""


def _plain(value):
  """As JSON has it: arrays as lists, numbers that are not finite as null, names that are no UTF-8 readable."""
  if isinstance(value, dict):
    return {name: _plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple, np.ndarray)):
    return [_plain(item) for item in (value.tolist() if isinstance(value, np.ndarray) else value)]
  if isinstance(value, (float, np.floating)):
    return float(value) if math.isfinite(value) else None
  return value
