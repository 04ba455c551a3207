"""What a run reports: printed lines and tables, and the files of curves and pictures."""

import json
import pathlib
import time
from collections.abc import Collection

import jax
import numpy as np
from PIL import Image

from segjax import input_pipeline, metrics
from segjax.files import atomic
from segjax.input_pipeline import inventory
from segjax.run import distributed, outputs
from segjax.run.trackers import Trackers
from segjax.state import without


def say(text: str, flush: bool = True) -> None:
  """Prints, on the first of several processes."""
  if jax.process_index() == 0:
    print(text, flush=flush)


def devices(mesh: jax.sharding.Mesh) -> str:
  """Devices, mesh and processes, as text."""
  return (
    f"{mesh.size} x {mesh.devices.flat[0].device_kind}, mesh data={mesh.shape['data']} space={mesh.shape['space']},"
    f" {jax.process_count()} process(es)"
  )


def data_lines(data, splits: dict) -> str:
  """What each of {split: source} holds, and the notes on it: at the start of whatever reads a split of `config.data`.

  Where not both splits of the config are given, entries of the folders that the other one may use are not noted.
  """
  loader = input_pipeline.loader_of(data)
  reason = ", because TensorFlow is not installed" if loader != data.loader else ""
  counts = ", ".join(f"{len(source)} images in {split!r}" for split, source in splits.items())
  classes = len(next(iter(splits.values())).classes)
  notes = [note for source in splits.values() for note in source.notes]
  notes += inventory.notes(splits, splits.keys() >= {data.train_split, data.eval_split})
  lines = [f"data: {counts}, {classes} classes, loader {loader}{reason}"]
  return "\n".join(lines + [f"note: {note}" for note in dict.fromkeys(notes)])


def complete_lines(config, workdir, start: int, best: float | None) -> str:
  """That a run is complete, and what can be done with it."""
  return (
    f"{workdir}: this run is complete ({start} of {config.num_steps} steps, best {config.policy.metric}"
    f" {_percent(best)}).\n  to continue:   raise --config.num_steps\n  to start over: give another --workdir\n"
    f"  to score it:   python -m segjax.main --mode=eval --workdir={workdir}"
  )


def progress_line(step: int, num_steps: int, scalars: dict[str, float], left: str) -> str:
  """The line of a log step, from its scalars and the time left."""
  bad = scalars["train/bad_examples"] if "train/bad_examples" in scalars else 0
  return (
    f"step {step:>6}/{num_steps}  loss {scalars['train/loss']:.4f}  lr {scalars['train/learning_rate']:.2e}"
    f"  {scalars['train/images_per_s']:.1f} images/s  data wait {100 * scalars['train/data_wait_share']:.0f} %"
    f"  ETA {left}" + (f"  bad examples {bad}" if bad else "")
  )


def stopped_early_line(config) -> str:
  """Why a run ends before its last step."""
  metric = f"{config.data.eval_split}/{config.policy.metric}"
  return f"stopped early: no gain in {metric} over {config.policy.early_stop} evaluations"


def preempted_line(signal: str, step: int, num_steps: int) -> str:
  """That a signal stopped a run, and how to continue it."""
  return (
    f"{signal}: stopped after step {step} of {num_steps}, checkpoint saved. The same command goes on from there (exit code"
    f" {distributed.PREEMPTED})"
  )


def closing_lines(config, workdir: pathlib.Path, mean_iou: float, checkpoints) -> str:
  """The final scores of a run, and where its files are."""
  return (
    f"done: {config.data.eval_split} mean IoU {_percent(mean_iou)}, best {config.policy.metric}"
    f" {_percent(checkpoints.best_score())} at step {checkpoints.best_step()}\n"
    f"  checkpoints  {checkpoints.folder}\n  curves       {workdir / 'metrics.jsonl'}"
    f" (or: tensorboard --logdir {workdir})\n  pictures     {workdir / 'overlays'}  (image | label | prediction)"
    + (f"\n  report       {page}" if (page := workdir / "report.html").exists() else "")
    + f"\nto use it: python -m segjax.predict --workdir={workdir} IMAGES --out=DIR"
  )


def _percent(share: float | None) -> str:
  return "-" if share is None else f"{100 * share:.2f} %"


class Writer:
  """Scalars and pictures of a run, under its workdir.

  `metrics.jsonl` gets one JSON object a line: "step" and any number of names. The same goes to the trackers.
  Of several processes the first writes, the others nothing.

  Args:
    workdir: created if missing.
    trackers: of a run, started here. None: the scores of one evaluation make no curve.
    start_step: lines of later steps are dropped: a run that resumes from an older checkpoint writes them again.
      None keeps all.
    unscored: drops the scores of that step too: it is to be evaluated again.

  Attributes:
    folder: the workdir.
    writes: whether this process does.
  """

  def __init__(
    self, workdir, *, trackers: Trackers | None = None, start_step: int | None = None, unscored: bool = False
  ):
    self.folder = pathlib.Path(workdir)
    self._path = self.folder / "metrics.jsonl"
    self._trackers = trackers
    self.writes, self._page_failed = jax.process_index() == 0, False
    if not self.writes:
      return
    self.folder.mkdir(parents=True, exist_ok=True)
    if start_step is not None and self._path.exists():
      lines = self._path.read_text(errors="replace").splitlines()
      lines = [line for line in lines if _step_of(line) <= (start_step, not unscored)]
      atomic.write_text(self._path, "".join(line + "\n" for line in lines))
    if trackers:
      trackers.start()

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Appends a line; NaN (a class that does not occur) becomes null, as JSON has no NaN."""
    if not self.writes:
      return
    values = {name: float(value) for name, value in values.items()}
    clean = {name: value if np.isfinite(value) else None for name, value in values.items()}
    with self._path.open("a") as file:
      file.write(json.dumps(dict(step=step, **clean)) + "\n")
    if self._trackers:
      self._trackers.scalars(step, {n: v for n, v in values.items() if np.isfinite(v)})

  def pictures(self, step: int, pictures: dict[str, np.ndarray], kind: str = "overlays") -> pathlib.Path:
    """Writes {name: [H, W, 3] uint8} as KIND/step_N/NAME.png (`outputs.flat_names`); returns the folder.

    One that cannot be written is left out, with a note: it must not cost the run.
    """
    folder = self.folder / kind / f"step_{step:06d}"
    if not self.writes:
      return folder
    files = outputs.flat_names(pictures, ".png")
    for name, picture in pictures.items():
      try:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / files[name])
      except (OSError, ValueError) as error:
        print(f"note: no picture of {name!r}: {error}", flush=True)
    if self._trackers:
      self._trackers.pictures(step, pictures)
    return folder

  def page(self, run: pathlib.Path | None = None) -> pathlib.Path | None:
    """Makes report.html anew, of the run in `folder` or in `run`; returns where it is, None where there is none.

    Whatever fails there is said once, and costs nothing but the page: all that it shows is in other files.
    """
    if not self.writes:
      return None
    try:
      from segjax.run import page  # Not earlier: it takes a second of imports.

      return page.write(self.folder if run is None else run)
    except Exception as error:
      if not self._page_failed:
        print(f"note: no report.html ({type(error).__name__}: {error}); the run needs none", flush=True)
      self._page_failed = True
      return None


def _step_of(line: str) -> tuple[float, bool]:
  """(step, whether it has its scores): the order of the lines of metrics.jsonl."""
  try:
    values = json.loads(line)
    return values["step"], "train/loss" not in values
  except (ValueError, KeyError, TypeError):
    return float("inf"), True  # A line cut short when its run was killed.


class Profiler:
  """Traces some steps of a run, on the host and on its devices, into `workdir`/profile; for a `with` block.

  For TensorBoard (with its profile plugin), and as perfetto_trace.json.gz for ui.perfetto.dev. clu's
  periodic_actions.Profile would import TensorFlow.

  Args:
    steps: (first, last), counted from 1; (0, 0): none.
  """

  def __init__(self, workdir, steps: tuple[int, int]):
    self._folder, (self._first, self._last) = pathlib.Path(workdir) / "profile", steps
    self._running = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    if self._running:  # The run ended before the last of them.
      self._stop()

  def step(self, step: int):
    """A context for the call of a step."""
    if step == self._first:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True
    return jax.profiler.StepTraceAnnotation("train", step_num=step)

  def after(self, step: int, result) -> bool:
    """Ends the trace when the last of the steps has given its `result`; whether it just did."""
    if not self._running or step < self._last:
      return False
    jax.block_until_ready(result)
    self._stop()
    return True

  def _stop(self) -> None:
    self._running = False
    jax.profiler.stop_trace()


class Progress:
  """Speed, share of time spent waiting for data, and time left, between progress lines.

  clu's periodic_actions.ReportProgress would import TensorFlow, and counts evaluations into the speed.
  """

  def __init__(self, step: int, num_steps: int, batch_size: int):
    self._num_steps, self._batch_size = num_steps, batch_size
    self._pace = None  # Seconds per step, without evaluations.
    self.restart(step)

  def restart(self, step: int) -> None:
    """Starts a new interval, e.g. after an evaluation."""
    self.step, self._start, self._waited = step, time.perf_counter(), 0.0

  def seconds(self) -> float:
    """Since the interval began."""
    return time.perf_counter() - self._start

  def wait(self, batches):
    """The next batch; the time it takes counts as waiting."""
    start = time.perf_counter()
    batch = next(batches)
    self._waited += time.perf_counter() - start
    return batch

  def lap(self, step: int) -> tuple[dict[str, float], str]:
    """Scalars of the interval up to `step`, and the time left as text; starts a new interval.

    Training calls `restart` after its first step, whose compilation would spoil both.
    """
    seconds = self.seconds()
    pace = seconds / (step - self.step)
    self._pace = pace if self._pace is None else 0.7 * self._pace + 0.3 * pace
    rates = {
      "train/images_per_s": self._batch_size / pace,
      "train/step_time_ms": 1e3 * pace,
      "train/data_wait_share": self._waited / seconds,
    }
    self.restart(step)
    return rates, duration((self._num_steps - step) * self._pace)


def duration(seconds: float) -> str:
  """75 -> '1:15', 3675 -> '1:01:15'."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def class_table(classes: tuple[str, ...], confusion: np.ndarray) -> str:
  """Per class: share of the labels, share of the predictions, IoU, all in per cent; then the means.

  '-' is the IoU of a class that neither labels nor predictions contain; the mean leaves it out.
  """
  scores, total = metrics.scores(confusion), max(confusion.sum(), 1)
  width = max(len(name) for name in (*classes, "class"))
  lines = [f"  {'class':<{width}}   label %    pred %     IoU %"]
  for i, name in enumerate(classes):
    iou = scores["iou_per_class"][i]
    label, predicted = 100 * confusion[i].sum() / total, 100 * confusion[:, i].sum() / total
    lines.append(f"  {name:<{width}} {label:9.2f} {predicted:9.2f} {'-' if np.isnan(iou) else f'{100 * iou:.2f}':>9}")
  lines.append(
    f"  mean IoU {100 * scores['mean_iou']:.2f} | pixel accuracy {100 * scores['pixel_accuracy']:.2f} | mean accuracy"
    f" {100 * scores['mean_accuracy']:.2f} | frequency-weighted IoU {100 * scores['frequency_weighted_iou']:.2f}"
  )
  if len(classes) == 2:
    foreground = f"IoU {100 * scores['iou_per_class'][1]:.2f}, Dice {100 * scores['dice_per_class'][1]:.2f}"
    lines.append(f"  foreground ({classes[1]}): {foreground}")
  absent = [name for name, iou in zip(classes, scores["iou_per_class"]) if np.isnan(iou)]
  if absent:
    lines.append(f"  in neither labels nor predictions, left out of the mean: {', '.join(absent)}")
  collapsed = metrics.collapsed_class(confusion)
  if collapsed is not None:
    lines.append(
      f"  WARNING PREDICTION_COLLAPSE: nearly all pixels are predicted as {classes[collapsed]!r}. Train longer, lower"
      " the learning rate, weigh the classes (loss.class_weights), or check the labels (python -m segjax.check_data)."
    )
  return "\n".join(lines)


def score_scalars(split: str, classes: tuple[str, ...], totals: metrics.Totals) -> dict[str, float]:
  """{"val/mean_iou": ..., "val/iou/Road": ...}; shares of 1. Two classes also have "val/foreground_iou", _dice, ..."""
  scores = metrics.scores(totals.confusion) | metrics.boundary_scores(totals.boundary) | totals.images.scores()
  scores |= metrics.calibration(totals.reliability)
  names = ("mean_iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "mean_dice", "boundary_iou")
  scalars = {f"{split}/{name}": scores[name] for name in (*names, "image_iou", "image_dice", "calibration_error")}
  if len(classes) == 2:
    foreground = ("iou", "dice", "boundary_iou", "image_iou", "image_dice")
    scalars |= {f"{split}/foreground_{name}": scores[f"{name}_per_class"][1] for name in foreground}
  return scalars | {f"{split}/iou/{name}": iou for name, iou in zip(classes, scores["iou_per_class"])}


def image_line(split: str, scalars: dict[str, float]) -> str:
  """The means over images, boundary IoU and calibration, of `score_scalars`."""
  boundary, iou, dice, error = (
    f"{100 * scalars[f'{split}/{name}']:.2f}"
    for name in ("boundary_iou", "image_iou", "image_dice", "calibration_error")
  )
  return f"  boundary IoU {boundary} | per image: IoU {iou}, Dice {dice} | calibration error {error}"


def threshold_line(sweep: np.ndarray, thresholds: tuple[float, ...]) -> str:
  """The threshold of best foreground IoU, of the confusion matrices [T, 2, 2] at all thresholds."""
  ious = [metrics.scores(confusion)["iou_per_class"][1] for confusion in sweep]
  if np.isnan(ious).all():
    return "  no foreground in labels or predictions: no threshold is best"
  best = int(np.nanargmax(ious))
  return f"  best threshold here: eval.threshold={thresholds[best]:g}, foreground IoU {100 * ious[best]:.2f}"


def parameter_table(params: dict, batch_stats: dict, frozen: Collection[str]) -> str:
  """Parameters per top-level module, in all, and frozen; clu.parameter_overview has a row per array, so hundreds for a ResNet.

  Args:
    frozen: of `Experiment.frozen`.
  """
  rows = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
  width = max(len(name) for name in (*rows, "frozen"))
  lines = [f"  {name:<{width}} {count:>12,}" for name, count in sorted(rows.items())]
  statistics = sum(x.size for x in jax.tree.leaves(batch_stats))
  lines.append(f"  {'all':<{width}} {sum(rows.values()):>12,}  (and {statistics:,} batch statistics)")
  if frozen:
    trained, updated = (sum(x.size for x in jax.tree.leaves(without(tree, frozen))) for tree in (params, batch_stats))
    lines.append(
      f"  {'frozen':<{width}} {sum(rows.values()) - trained:>12,}  (and {statistics - updated:,} batch statistics)"
    )
  return "\n".join(lines)
