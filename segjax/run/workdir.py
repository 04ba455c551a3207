"""The folder of a run: claimed by one process at a time, for one config and its examples.

It holds config.json, task.json and examples_SPLIT.json, which say what the run is; checkpoints/; and what it reports:
metrics.jsonl, TensorBoard's files, overlays/, evaluations/, report.html.
"""

import contextlib
import errno
import pathlib

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.config import rules as config_rules
from segjax.run import checkpoint, distributed
from segjax.run.checkpoint import Checkpoints
from segjax.run.lock import LOCK_FILE, Lock


class WorkdirError(RuntimeError):
  """The workdir was removed during a run or could not be written, e.g. on a full disk; the message names what is left."""


@contextlib.contextmanager
def named_failures(workdir: pathlib.Path):
  """Raises WorkdirError where the system refuses to write what a run leaves; what it reads has errors of its own."""
  try:
    yield
  except OSError as error:
    if isinstance(error, FileNotFoundError) or _missing(workdir / config_lib.CONFIG_FILE):
      raise WorkdirError(
        f"{workdir} was removed, moved or emptied during the run ({error}). Put back what is missing, and the same command goes"
        " on from the newest checkpoint there; without it, start again."
      ) from error
    newest = checkpoint.newest_step(workdir)
    kept = "There is no complete checkpoint yet" if newest is None else f"The checkpoint of step {newest} is complete"
    raise WorkdirError(
      f"{workdir} can no longer be written: {error}\n{kept}. Free space there (df -h {workdir}; fewer"
      " keep_checkpoints need less) or restore write access, and give the same command: it goes on from there."
    ) from error


def _missing(path: pathlib.Path) -> bool:
  try:
    path.stat()
  except OSError as error:
    return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
  return False


def claim_workdir(config, workdir: pathlib.Path, say) -> Lock:
  """Makes `workdir` this run's: saves the config, or compares it with the one that is there, and locks it.

  Returns:
    The lock, for a `with` block; process 0 holds it for all.

  Raises:
    ConfigError: fields that would change the run differ, or the folder holds something else, or cannot be written, or
      another run is writing there.
  """
  lock = Lock(workdir)
  distributed.on_first(lambda: _claim(config, workdir, lock, say))
  return lock


def _claim(config, workdir: pathlib.Path, lock: Lock, say) -> None:
  if (workdir / config_lib.CONFIG_FILE).exists():
    saved = config_lib.load(workdir)
    differences = config_lib.differences(config, saved, config_rules.idle(config))
    if differences:
      raise ConfigError(
        f"{workdir} holds a run with another config:\n  " + "\n  ".join(differences) + "\nGive another --workdir, or"
        " set these fields back to continue that run."
      )
    if config.num_steps != saved.num_steps and config.optimizer.schedule != "constant":
      say(
        f"note: num_steps {saved.num_steps} -> {config.num_steps} stretches the {config.optimizer.schedule} schedule,"
        " so the learning rate jumps where the run resumes"
      )
  elif workdir.is_dir() and any(path.name != LOCK_FILE for path in workdir.iterdir()):
    raise ConfigError(
      f"{workdir} is not empty and holds no {config_lib.CONFIG_FILE}, so it is not the workdir of a run. Give another"
      " --workdir."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock.acquire(say)
    config_lib.save(config, workdir)
  except OSError as error:
    raise ConfigError(f"{workdir} cannot be written ({error}). Give another --workdir.") from error


def open_checkpoints(workdir: pathlib.Path, keep: int, say) -> Checkpoints:
  """The checkpoints to go on from, the newest of which is sound; damaged newer ones are set aside, and said so.

  Raises:
    ConfigError: there are some, and none is sound.
  """
  for note in distributed.on_first(lambda: checkpoint.set_aside_damaged(workdir)):
    say(note)
  return Checkpoints(workdir, keep)
