"""Checkpoints: Orbax, written in the background, the last k and the best one."""

import dataclasses
import pathlib

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from segjax.config import ConfigError
from segjax.state import TrainState


class Checkpoints:
  """The checkpoints of a workdir.

  A checkpoint is the state alone: data order and random keys follow from its step and the seed, so nothing else is
  needed to continue bit for bit. Each is written under a temporary name and renamed when complete.

  Args:
    workdir: its folder `checkpoints` is used.
    keep: how many of the last ones stay, beside the best.
  """

  def __init__(self, workdir, keep: int = 1, read_only: bool = False):
    self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
    policies = [
      checkpoint_managers.LatestN(keep),
      checkpoint_managers.BestN(
        get_metric_fn=lambda metrics: metrics["score"], n=1, keep_checkpoints_without_metrics=False
      ),
    ]
    options = ocp.CheckpointManagerOptions(
      preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      best_fn=lambda metrics: metrics["score"],
      step_prefix="step",
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(self.folder, options=options)

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The checkpoint of the best score; None where none was scored."""
    return self._manager.best_step()

  def best_score(self) -> float | None:
    """The score of `best_step`."""
    step = self.best_step()
    return None if step is None else float(self._manager.metrics(step)["score"])

  def save(self, state: TrainState, score: float | None = None) -> None:
    """Starts saving the state under its step; a step that is there already is left as it is.

    Args:
      score: higher is better; of a step that was evaluated.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    metrics = None if score is None else {"score": score}
    self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)), metrics=metrics, force=True)

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """Reads a checkpoint into the shapes and shardings of `abstract`, on any number of devices.

    Raises:
      ConfigError: it holds another model or optimiser.
    """
    try:
      restored = self._manager.restore(step, args=ocp.args.StandardRestore(_as_dict(abstract)))
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(f"{self.folder}: step {step} does not hold the state of this config: {error}") from error
    return TrainState(**restored)

  def restore_variables(self, step: int) -> dict:
    """{"params", "batch_stats"} of any checkpoint, whatever its model, on the host; the averages where there are any."""
    restored = self._manager.restore(step, args=ocp.args.StandardRestore())
    return restored["ema"] or {name: restored[name] for name in ("params", "batch_stats")}

  def wait(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is on disk, and ends Orbax's threads."""
    self.wait()
    self._manager.close()


def _as_dict(state: TrainState) -> dict:
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
