"""Experiment trackers that a run's scalars and pictures also go to: `config.trackers` names them.

metrics.jsonl and overlays/ in the workdir are the record; a tracker is a copy for people, so none ever stops a run.
"""

import importlib.util
import os
import pathlib
import re
import time
from typing import Protocol

import numpy as np

from segjax.config import ConfigError
from segjax.files import atomic
from segjax.run import outputs


class Tracker(Protocol):
  """One of them. Whatever it raises ends its use in this run, not the run.

  Its constructor takes `config` {field: value}, the `workdir`, and the `id` under which this run goes on there, or ""
  for a new one. To add another: such a class, a row of `TRACKERS`, and an extra of that name in setup.py.

  Attributes:
    id: by which the run is found again after a restart; "" where it needs none.
  """

  id: str

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Adds finite numbers."""

  def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
    """Adds {name: [H, W, 3] uint8}."""

  def close(self, failed: bool) -> None:
    """Sends what is left. `failed`: an exception or a signal ended the run, so that it may go on later."""


class TensorBoard:
  """Event files in the workdir."""

  id = ""

  def __init__(self, config: dict, workdir: pathlib.Path, id: str):
    from segjax.run.events import EventFile  # 0.2 s of imports, for training only.

    self._events = EventFile(workdir)

  def scalars(self, step, values):
    self._events.scalars(step, values)

  def pictures(self, step, pictures):
    for name, picture in pictures.items():
      self._events.picture(step, f"overlays/{name}", picture)

  def close(self, failed):
    pass  # Each event is on disk when its call returns.


class WandB:
  """Weights & Biases. Its variables decide where to: WANDB_PROJECT (segjax), WANDB_MODE=offline (into the workdir), ...

  Numbers have "step" as their axis: W&B's own counter takes no step again, as a run does that resumes.
  """

  def __init__(self, config: dict, workdir: pathlib.Path, id: str):
    import wandb

    self._image = wandb.Image
    self._run = wandb.init(
      project=os.environ.get("WANDB_PROJECT") or "segjax",
      id=id or None,
      resume="allow",
      name=workdir.name,
      dir=workdir,
      config=config,
      settings=wandb.Settings(console="off", quiet=True),  # The run's output stays its own (run/streams.py).
    )
    self.id = self._run.id
    self._run.define_metric("*", step_metric="step")

  def scalars(self, step, values):
    self._run.log(dict(step=step, **values))

  def pictures(self, step, pictures):
    self._run.log(dict(step=step) | {f"overlays/{name}": self._image(picture) for name, picture in pictures.items()})

  def close(self, failed):
    self._run.finish(exit_code=int(failed))


class MLflow:
  """MLflow. Its variables decide where to: MLFLOW_TRACKING_URI (a server, file: or sqlite:), MLFLOW_EXPERIMENT_NAME (segjax)."""

  def __init__(self, config: dict, workdir: pathlib.Path, id: str):
    from mlflow import MlflowClient, entities

    self._client, self._entities, self.id = MlflowClient(), entities, id
    if id:
      self._client.update_run(id, status="RUNNING")
      return
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "segjax"
    experiment = self._client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment else self._client.create_experiment(name)
    self.id = self._client.create_run(number, run_name=workdir.name).info.run_id
    parameters = [entities.Param(field, str(value)) for field, value in config.items()]
    for start in range(0, len(parameters), 100):  # It takes no more at once.
      self._client.log_batch(self.id, params=parameters[start : start + 100])

  def scalars(self, step, values):
    now = int(1e3 * time.time())
    metrics = [
      self._entities.Metric(re.sub(r"[^\w\-. :/]", "_", name), value, now, step) for name, value in values.items()
    ]
    for start in range(0, len(metrics), 1000):
      self._client.log_batch(self.id, metrics=metrics[start : start + 1000])

  def pictures(self, step, pictures):
    for name, file in outputs.flat_names(pictures, ".png").items():
      self._client.log_image(self.id, pictures[name], f"overlays/step_{step:06d}/{file}")

  def close(self, failed):
    self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}  # By the package that each needs.


def check(names: tuple[str, ...]) -> None:
  """Before anything slow.

  Raises:
    ConfigError: the package of one of them is not installed; how to install it.
  """
  for name in names:
    if importlib.util.find_spec(name) is None:
      extra = "" if name == "tensorboard" else f"[{name}]"
      raise ConfigError(
        f"config.trackers names {name}, whose package is not installed: pip install 'segjax{extra}' (in a checkout: pip"
        f" install -e '.{extra}'), or leave it out of trackers."
      )


class Trackers:
  """All of a run's, for a `with` block; one that fails is named once, and left alone from there on.

  Their ids are kept in the workdir, so that a run that resumes goes on in the same run of each.

  Args:
    names: of `TRACKERS`; none on processes that do not write.
    config: {field: value}, all of them.
    say: prints a line.
  """

  def __init__(self, names: tuple[str, ...], config: dict, workdir, say):
    self._names, self._config, self._workdir, self._say = dict.fromkeys(names), config, pathlib.Path(workdir), say
    self._running: dict[str, Tracker] = {}

  def __enter__(self) -> "Trackers":
    return self

  def __exit__(self, kind, *error) -> None:
    self._each(lambda tracker: tracker.close(kind is not None))

  def start(self) -> None:
    """Opens each one."""
    for name in self._names:
      self._attempt(name, lambda name=name: self._open(name))

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Passes finite numbers on."""
    self._each(lambda tracker: tracker.scalars(step, values))

  def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
    """Passes {name: [H, W, 3] uint8} on."""
    self._each(lambda tracker: tracker.pictures(step, pictures))

  def _open(self, name: str) -> None:
    kept = self._workdir / f"{name}.id"
    known = kept.read_text().strip() if kept.exists() else ""
    tracker = TRACKERS[name](self._config, self._workdir, known)
    self._running[name] = tracker
    if tracker.id != known:
      atomic.write_text(kept, tracker.id)

  def _each(self, action) -> None:
    for name, tracker in list(self._running.items()):
      self._attempt(name, lambda tracker=tracker: action(tracker))

  def _attempt(self, name: str, action) -> None:
    try:
      action()
    except Exception as error:  # Whatever it is: the record is in the workdir, and training must go on.
      self._running.pop(name, None)
      self._say(
        f"note: {name} gets nothing more of this run ({type(error).__name__}: {error}); metrics.jsonl and overlays/ have it all"
      )
