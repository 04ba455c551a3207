"""Checkpoints: written by Orbax in the background; the last k and the best one are kept, each with its checksums."""

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from segjax.config import ConfigError
from segjax.files import atomic
from segjax.run import distributed
from segjax.state import TrainState, overlay

CHECKSUMS = (
  "SHA256SUMS"  # In each checkpoint, as Orbax keeps no checksums of whole files; `sha256sum -c` reads it as well.
)
DAMAGED = "damaged_checkpoints"  # In the workdir.


def _write_checksums(folder: pathlib.Path) -> None:
  # The files at the top are Orbax's notes about the save, which it still completes; nothing is restored from them.
  files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
  (folder / CHECKSUMS).write_text("".join(f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in files))


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: pathlib.Path) -> list[str]:
  """What is wrong with a checkpoint, one line for each file; [] where every file is as it was written."""
  try:
    lines = (folder / CHECKSUMS).read_text().splitlines()
  except OSError as error:
    return [f"{folder / CHECKSUMS} cannot be read ({error.strerror})"]
  except UnicodeDecodeError:
    return [f"{folder / CHECKSUMS} is not text"]
  found = [] if lines else [f"{folder / CHECKSUMS} is empty"]
  for line in lines:
    digest, _, name = line.partition("  ")
    try:
      if _sha256(folder / name) != digest:
        found.append(f"{folder / name} is not as it was written")
    except (OSError, ValueError) as error:
      found.append(f"{folder / name} cannot be read ({error})")
  return found


def set_aside_damaged(workdir) -> list[str]:
  """Moves damaged checkpoints that are newer than the newest sound one out of the way, deleting nothing.

  To be called by one process, before any opens `Checkpoints` to go on with the run.

  Returns:
    A line for each, naming file and new place; [] where the newest is sound, or there is none.

  Raises:
    ConfigError: none is sound; all stay where they are.
  """
  workdir = pathlib.Path(workdir)
  bad = []
  for step in sorted(_steps(workdir / "checkpoints"), reverse=True):
    folder = workdir / "checkpoints" / f"step_{step}"
    found = damage(folder)
    if not found:
      break
    bad.append((folder, found))
  else:
    if bad:
      raise ConfigError(
        "Every checkpoint is damaged:\n  "
        + "\n  ".join(line for _, found in bad for line in found)
        + f"\nNothing was deleted. Restore one of them, or start anew with another --workdir (init.path={workdir} cannot"
        " help, it reads the same files)."
      )
  notes = []
  for folder, found in bad:
    (workdir / DAMAGED).mkdir(exist_ok=True)
    target, number = workdir / DAMAGED / folder.name, 1
    while target.exists():
      target, number = workdir / DAMAGED / f"{folder.name}-{number}", number + 1
    folder.rename(target)
    notes.append(f"DAMAGED CHECKPOINT {folder.name}, set aside as {target}: {'; '.join(found)}")
  return notes


def check_any(workdir) -> None:
  """Raises ConfigError where `workdir` holds no complete checkpoint."""
  folder = pathlib.Path(workdir) / "checkpoints"
  if not _steps(folder):
    raise ConfigError(f"{folder} holds no checkpoint. Train first, or check --workdir.")


def _steps(folder: pathlib.Path) -> list[int]:
  names = [path.name.removeprefix("step_") for path in folder.glob("step_*")]
  return [int(name) for name in names if name.isdecimal()]  # Others are being written.


@dataclasses.dataclass(frozen=True)
class Score:
  """What an evaluation found of a checkpoint.

  Attributes:
    value: higher is better; NaN where the metric has none.
    measure: what it depends on beside the weights, see `validation.measure`; scores of another one cannot be compared.
    regime: of the policies that it counts for, see `optimizer.init_policy`.
  """

  value: float
  measure: dict | None = None
  regime: int = 0

  def write(self, folder: pathlib.Path) -> None:
    """Adds it to a complete checkpoint, whole or not at all: first the file, then its checksum."""
    path = folder / "metrics" / "metrics"  # Where Orbax looks for it.
    path.parent.mkdir(exist_ok=True)
    value = None if math.isnan(self.value) else self.value
    atomic.write_text(path, json.dumps(dict(score=value, measure=self.measure, regime=self.regime)))
    sums = folder / CHECKSUMS
    atomic.write_text(sums, f"{sums.read_text()}{_sha256(path)}  {path.relative_to(folder)}\n")


class _KeepsLastAndBest:
  """Orbax' `PreservationPolicy`: the newest `keep` checkpoints, and that of the best score."""

  def __init__(self, keep: int, best_step):
    self._keep, self._best_step = keep, best_step

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    kept = {*sorted(checkpoint.step for checkpoint in checkpoints)[-self._keep :], self._best_step()}
    return [checkpoint.step in kept for checkpoint in checkpoints]


class Checkpoints:
  """The checkpoints of a workdir.

  A checkpoint is the state alone: data order and random keys follow from its step and the seed, so nothing else is
  needed to continue bit for bit. Each is written under a temporary name, where it gets its checksums, and renamed when
  complete: a run that dies before the rename leaves no checkpoint of that step. To be used in a `with` block, which waits
  at its end until everything is on disk, and ends Orbax's threads.

  Args:
    workdir: its folder `checkpoints` is used.
    keep: how many of the last ones stay, beside the best.
    read_only: nothing is written; what is restored is checked first (a run that goes on has had `set_aside_damaged` do
      so).

  Raises:
    ConfigError: a score that cannot be read.
  """

  def __init__(self, workdir, keep: int = 1, read_only: bool = False):
    self.folder = pathlib.Path(workdir).resolve() / "checkpoints"
    self._read_only = read_only
    self._keep = keep
    self._saving = None  # The step that is being written.
    options = ocp.CheckpointManagerOptions(
      preservation_policy=_KeepsLastAndBest(keep, self.best_step),
      step_prefix="step",
      read_only=read_only,
      temporary_path_class=ocp.path.atomicity.AtomicRenameTemporaryPath,  # Which `_add_checksums` counts on.
      async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
    )
    try:
      self._manager = ocp.CheckpointManager(self.folder, options=options)
      self._scores = {step: score for step in self._manager.all_steps() if (score := self._read_score(step))}
    except (ValueError, KeyError, TypeError) as error:
      found = [line for step in _steps(self.folder) for line in damage(self.folder / f"step_{step}")]
      raise ConfigError(
        f"{self.folder} cannot be opened: {'; '.join(found) or error}. Restore what is damaged, or move that checkpoint"
        " elsewhere."
      ) from error

  def latest_step(self) -> int | None:
    """The newest complete checkpoint, or None."""
    return self._manager.latest_step()

  def score(self, step: int) -> Score | None:
    """What was recorded of a step; None where it is not there, or was not evaluated to the end."""
    return self._scores[step] if step in self._scores else None

  def best_step(self) -> int | None:
    """The checkpoint of the best score among those measured as the last one was; None where none has a score."""
    steps = self._manager.all_steps()
    scores = {n: s for n, s in self._scores.items() if n in steps and not math.isnan(s.value)}
    comparable = [step for step, score in scores.items() if score.measure == scores[max(scores)].measure]
    return max(comparable, key=lambda step: (scores[step].value, step), default=None)

  def best_score(self) -> float | None:
    """The score of `best_step`."""
    step = self.best_step()
    return None if step is None else self._scores[step].value

  def save(self, state: TrainState, score: float | None = None) -> None:
    """Starts saving the state under its step; a step that is there already is left as it is.

    Args:
      score: to `record` at once, where it is known.

    Raises:
      OSError: this or the save before could not be written, e.g. because the disk is full.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self.wait()  # As Orbax would a little later.
    self._saving = step
    with _system_errors():
      self._manager.save(step, args=ocp.args.StandardSave(_as_dict(state)), force=True)
    if score is not None:
      self.record(step, Score(score))

  def record(self, step: int, score: Score) -> None:
    """Writes down the score of a saved step, and removes checkpoints that are neither new nor best any more.

    Raises:
      OSError: the checkpoint or its score could not be written.
    """
    self.wait()
    distributed.on_first(lambda: score.write(self.folder / f"step_{step}"))
    self._scores[step] = score
    steps = sorted(self._manager.all_steps())
    for old in {*steps[: -self._keep]} - {self.best_step()}:
      self._manager.delete(old)

  def restore(self, abstract: TrainState, step: int) -> TrainState:
    """Reads a checkpoint into the shapes and shardings of `abstract`, on any number of devices.

    Raises:
      ConfigError: it holds another model or optimiser, or is damaged.
    """
    self._check(step)
    try:
      restored = self._manager.restore(step, args=ocp.args.StandardRestore(_as_dict(abstract)))
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(f"{self.folder}: step {step} does not hold the state of this config: {error}") from error
    return TrainState(**restored)

  def restore_on_host(self, step: int) -> dict:
    """The whole state as NumPy arrays, {"step", "params", ...}, whatever its model and the devices that saved it.

    Raises:
      ConfigError: it is damaged, or was not written by segjax.
    """
    self._check(step)
    # Not `self._manager`: without a target it wants the very devices that saved.
    folder = self.folder / f"step_{step}" / "default"
    with ocp.StandardCheckpointer() as checkpointer:
      try:
        stored = checkpointer.metadata(folder).item_metadata.tree
        return checkpointer.restore(folder, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored))
      except Exception as error:  # Forged files may have fitting checksums; Orbax names no exceptions.
        raise ConfigError(f"{folder} is no checkpoint of segjax ({type(error).__name__}: {error}).") from error

  def restore_variables(self, step: int) -> dict:
    """{"params", "batch_stats"} of any checkpoint, whatever its model, on the host; the averages where there are any.

    Raises:
      ConfigError: it is damaged.
    """
    restored = self.restore_on_host(step)
    return overlay({name: restored[name] for name in ("params", "batch_stats")}, restored["ema"] or {})

  def wait(self) -> None:
    """Waits until everything is on disk; raises OSError where it cannot be."""
    with _system_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits until everything is on disk, and ends Orbax's threads."""
    try:
      self.wait()
    finally:
      with _system_errors():
        self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, trace) -> None:
    # After a failure among several processes the others may be gone, and Orbax would wait for them.
    if jax.process_count() == 1 or error is None or isinstance(error, SystemExit):
      self.close()

  def _add_checksums(self) -> None:
    """Called by Orbax when all files are written, before the rename that completes a checkpoint: none lacks them."""
    _write_checksums(self.folder / f"step_{self._saving}{ocp.utils.TMP_DIR_SUFFIX}")

  def _read_score(self, step: int) -> Score | None:
    stored = self._manager.metrics(step)
    if stored is None:
      return None
    value = math.nan if stored["score"] is None else float(stored["score"])
    return Score(value, stored["measure"], stored["regime"]) if "measure" in stored else Score(value)

  def _check(self, step: int) -> None:
    found = damage(self.folder / f"step_{step}") if self._read_only else []
    if found:
      raise ConfigError(
        "; ".join(found)
        + ". Use another checkpoint (--config.eval.checkpoint=last or best), or continue the run, which"
        " sets a damaged last one aside and goes on from the one before."
      )


@contextlib.contextmanager
def _system_errors():
  """Raises an OSError where TensorStore raises a ValueError that quotes an error of the operating system."""
  try:
    yield
  except ValueError as error:
    if "os_error_code=" not in str(error):
      raise
    raise OSError(str(error)) from error


def newest_step(workdir) -> int | None:
  """The step of the newest complete checkpoint of a workdir, or None."""
  return max(_steps(pathlib.Path(workdir) / "checkpoints"), default=None)


def _as_dict(state: TrainState) -> dict:
  return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
