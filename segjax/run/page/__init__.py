"""report.html: a run, or several beside each other, as one page that needs nothing but itself.

It is made of what the workdir holds (metrics.jsonl, evaluations/, overlays/), so it can be made again at any time.
"""

import datetime
import importlib.resources
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import markupsafe
import numpy as np

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.files import atomic
from segjax.input_pipeline import DataError, images
from segjax.run import pictures, record
from segjax.run.page import charts

FILE = "report.html"
MAX_RUNS = 10  # As many colours as curves can be told apart by.
_NUMBERED = 24  # Classes up to which a confusion matrix has numbers in its cells.
_SCORES = {
  "mean_iou": "mean IoU",
  "boundary_iou": "boundary IoU",
  "image_iou": "IoU per image",
  "image_dice": "Dice per image",
  "foreground_iou": "foreground IoU",
  "foreground_dice": "foreground Dice",
  "foreground_image_dice": "foreground Dice per image",
  "pixel_accuracy": "pixel accuracy",
  "mean_accuracy": "mean accuracy",
  "frequency_weighted_iou": "frequency-weighted IoU",
  "calibration_error": "calibration error",
}
_HEADLINES = tuple(name for name in _SCORES if name not in ("mean_accuracy", "frequency_weighted_iou"))
_CURVES = {"loss": "train/loss", "learning rate": "train/learning_rate", "images/s": "train/images_per_s"}


class Run(NamedTuple):
  """What a page shows of a workdir.

  Attributes:
    name: of the folder.
    folder: the workdir.
    record: of its newest evaluation, see `record.write`; None where there is none.
    origin: the folder of that evaluation: the workdir, or its eval_SPLIT.
    curves: {name: (steps, values)} of metrics.jsonl; NaN where a score has no value.
    config: {field: value}, of the evaluation or else of the run; {} where there is neither.
  """

  name: str
  folder: pathlib.Path
  record: dict | None
  origin: pathlib.Path
  curves: dict[str, tuple[np.ndarray, np.ndarray]]
  config: dict


def load(folder: pathlib.Path) -> Run:
  """Reads a workdir.

  Raises:
    ConfigError: it holds neither curves nor an evaluation, or a damaged file.
  """
  try:
    curves = _curves(folder / "metrics.jsonl")
    found = {place: record.newest(place) for place in (folder, *sorted(folder.glob("eval_*")))}
    found = {place: content for place, content in found.items() if content}
    newest = max(found, key=lambda place: found[place]["time"], default=folder)
    content = found[newest] if found else None
    saved = folder / config_lib.CONFIG_FILE
    config = content["config"] if content else config_lib.fields(config_lib.load(folder)) if saved.exists() else {}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(f"{folder}: its report cannot be made: {error}") from error
  if not curves and content is None:
    raise ConfigError(
      f"{folder}: no workdir of a run, as it has neither metrics.jsonl nor evaluations/. Name a workdir."
    )
  return Run(folder.resolve().name, folder, content, newest, curves, config)


def _curves(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  points = {}
  for line in path.read_text().splitlines() if path.exists() else ():
    values = json.loads(line)
    step = values.pop("step")
    for name, value in values.items():
      points.setdefault(name, []).append((step, np.nan if value is None else value))
  return {name: tuple(np.array(pairs, float).T) for name, pairs in points.items()}


def write(folder: pathlib.Path, path: pathlib.Path | None = None) -> pathlib.Path:
  """The page of one run: `folder`/report.html, or `path`. Whole or not at all.

  Raises:
    ConfigError: see `load`.
  """
  run, path = load(folder), path or folder / FILE
  return _write(path, "run.html", run=run, **_of_record(run), charts=_charts([run]), changed=_changed(run.config))


def compare(folders: Sequence[pathlib.Path], path: pathlib.Path) -> pathlib.Path:
  """The page of several runs.

  Raises:
    ConfigError: too many runs, or see `load`.
  """
  if len(folders) > MAX_RUNS:
    raise ConfigError(f"{len(folders)} runs: curves of more than {MAX_RUNS} cannot be told apart. Name fewer.")
  runs = [load(folder) for folder in folders]
  scores = {}
  for number, run in enumerate(runs):
    for name, value in _plain_scores(run).items():
      scores.setdefault(name, [None] * len(runs))[number] = value
  classes = list(dict.fromkeys(name for run in runs if run.record for name in run.record["classes"]))
  return _write(
    path,
    "compare.html",
    runs=runs,
    names=_names(runs),
    charts=_charts(runs),
    scores=[(label, scores[name], _best(name, scores[name])) for name, label in _SCORES.items() if name in scores],
    classes=[(name, values, _best("iou", values)) for name in classes if (values := _of_class(runs, name))],
    fields=_differing(runs),
  )


def _names(runs: list[Run]) -> list[str]:
  """Of the folders, with those above them where several have the same."""
  names = [run.name for run in runs]
  return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs)]


def _plain_scores(run: Run) -> dict[str, float]:
  """The scores of the newest evaluation without its split's name."""
  if run.record is None:
    return {}
  prefix = f"{run.record['split']}/"
  return {name.removeprefix(prefix): value for name, value in run.record["scores"].items()}


def _of_class(runs: list[Run], name: str) -> list[float | None]:
  of_run = [dict(zip(run.record["classes"], run.record["per_class"]["iou"])) if run.record else {} for run in runs]
  return [ious[name] if name in ious else None for ious in of_run]


def _best(name: str, values: list[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  if len(set(known)) < 2:
    return None
  return min(known) if name == "calibration_error" else max(known)


def _differing(runs: list[Run]) -> list[tuple[str, list]]:
  fields = sorted({name for run in runs for name in run.config})
  rows = [(name, [run.config[name] if name in run.config else None for run in runs]) for name in fields]
  return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


def _changed(config: dict) -> list[tuple[str, object, object]]:
  """(field, value, default) where they differ, but for model and data source; [] without a config."""
  pairs = config_lib.changed(config) if config else {}
  return [(name, *pair) for name, pair in pairs.items() if name not in ("model.name", "data.name")]


def _charts(runs: list[Run]) -> list[dict]:
  """title, svg and legend [(color, name)] of the curves that there are, of one run or of several in their colours."""
  legend, made = list(enumerate(_names(runs))) if len(runs) > 1 else [], []
  for title, name in _CURVES.items():
    curves = [charts.Curve(*run.curves[name], n, title == "loss") for n, run in enumerate(runs) if name in run.curves]
    if curves:
      # A loss of 1e-3 after one of 3 would lie on the axis.
      log = title == "loss" and all(np.nanmin(curve.y) > 0 for curve in curves) and _spread(curves) > 50
      made.append(dict(title=title, svg=charts.lines(curves, log=log), legend=legend))
  scored = ("mean_iou", "boundary_iou", "image_iou") if len(runs) == 1 else ("mean_iou",)
  curves, names = [], []
  for n, run in enumerate(runs):
    for m, name in enumerate(scored):
      if (place := f"{_curve_split(run)}/{name}") in run.curves:
        curves.append(charts.Curve(*run.curves[place], n + m))
        names.append((n + m, _SCORES[name]))
  if curves:
    title = "scores" if len(runs) == 1 else "mean IoU"
    made.append(dict(title=title, svg=charts.lines(curves, percent=True), legend=legend or names))
  return made + (_class_chart(runs[0]) if len(runs) == 1 else [])


def _class_chart(run: Run) -> list[dict]:
  """The IoU of each class, where they are few; the table of classes has a small curve of each anyway."""
  prefix = f"{_curve_split(run)}/iou/"
  names = [name for name in run.curves if name.startswith(prefix)]
  if not 2 <= len(names) <= MAX_RUNS:
    return []
  svg = charts.lines([charts.Curve(*run.curves[name], n) for n, name in enumerate(names)], percent=True)
  return [dict(title="IoU per class", svg=svg, legend=[(n, name[len(prefix) :]) for n, name in enumerate(names)])]


def _spread(curves: list[charts.Curve]) -> float:
  values = np.concatenate([curve.y for curve in curves])
  return float(np.nanmax(values) / np.nanmin(values))


def _curve_split(run: Run) -> str:
  """The split that the run itself evaluates."""
  return next((name.removesuffix("/mean_iou") for name in run.curves if name.endswith("/mean_iou")), "")


def _of_record(run: Run) -> dict:
  """What the page of one run shows of its newest evaluation."""
  if run.record is None:
    return dict(scores=[], classes=[], matrix=[], diagram="", examples=[], numbered=True)
  plain, confusion = _plain_scores(run), np.array(run.record["confusion"])
  bins = {name: np.array(values, float) for name, values in run.record["reliability"].items()}
  return dict(
    scores=[(_SCORES[name], plain[name]) for name in _HEADLINES if name in plain],
    classes=_class_rows(run, confusion),
    matrix=_matrix(run.record["classes"], confusion),
    numbered=len(confusion) <= _NUMBERED,
    diagram=charts.reliability(**bins),
    examples=[dict(example, panels=_panels(run.origin / example["picture"])) for example in run.record["examples"]],
  )


def _class_rows(run: Run, confusion: np.ndarray) -> list[dict]:
  found, total, split, rows = run.record["per_class"], max(confusion.sum(), 1), _curve_split(run), []
  for n, (name, color) in enumerate(zip(run.record["classes"], run.record["colors"])):
    row = {key: found[key][n] for key in ("iou", "boundary_iou", "image_iou", "accuracy")}
    row |= dict(name=name, color=color, label=confusion[n].sum() / total, predicted=confusion[:, n].sum() / total)
    curve = run.curves[f"{split}/iou/{name}"] if f"{split}/iou/{name}" in run.curves else None
    rows.append(row | dict(trend=_sparkline(*curve) if curve is not None else ""))
  return rows


def _sparkline(steps: np.ndarray, values: np.ndarray) -> str:
  """Points of an SVG polyline in a box of 80 by 18, 0 at its foot and 100 % at its head."""
  known = np.isfinite(values)
  x = 80 * (steps - steps[0]) / max(steps[-1] - steps[0], 1)
  return " ".join(f"{a:.1f},{17 - 16 * b:.1f}" for a, b in zip(x[known], values[known])) if known.sum() > 1 else ""


def _matrix(classes: list[str], confusion: np.ndarray) -> list[dict]:
  """Rows of the confusion matrix: a label's name, and the share and the count of each prediction."""
  shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
  return [
    dict(name=name, total=int(row.sum()), cells=list(zip(row.tolist(), share.tolist())))
    for name, row, share in zip(classes, confusion, shares)
  ]


def _panels(path: pathlib.Path) -> list[str]:
  """The four panels of `pictures.comparison` as data URIs; [] where its file is gone."""
  try:
    with images.opened(path, None, "not a picture") as picture:
      width, height = picture.width // 4, picture.height
      parts = [picture.crop((n * width, 0, (n + 1) * width, height)).convert("RGB") for n in range(4)]
  except DataError:
    return []
  # Small ones are shown larger.
  return [pictures.data_uri(part, lossless=max(part.size) <= 160) for part in parts]


def _write(path: pathlib.Path, template: str, **content) -> pathlib.Path:
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: (importlib.resources.files(__package__) / name).read_text()),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  environment.filters |= dict(percent=_percent, count=_count, value=_value, svg=markupsafe.Markup)
  environment.globals |= dict(zip=zip, made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"))
  html = environment.get_template(template).render(**content)
  atomic.write_text(path, html.encode(errors="backslashreplace").decode())  # Names of files may be no UTF-8.
  return path


def _percent(share: float | None) -> str:
  return "–" if share is None or not np.isfinite(share) else f"{100 * share:.2f}"


def _count(number: int) -> str:
  """1234567 -> '1.2M'."""
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if number >= size:
      return f"{number / size:.3g}{letter}"
  return f"{number}"


def _value(value) -> str:
  """Of a config, as it is written on the command line."""
  if isinstance(value, (list, tuple)):
    return ", ".join(map(str, value)) or "()"
  return "–" if value is None else str(value) or '""'
