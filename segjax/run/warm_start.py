"""The weights that `config.init` names: another run's, or a file of another framework's."""

import pathlib

from segjax import config as config_lib
from segjax import pretrained
from segjax.config import ConfigError
from segjax.pretrained import channels, fetch, files
from segjax.run import checkpoint
from segjax.run.checkpoint import Checkpoints


def load(init) -> tuple[dict, str]:
  """Reads what `config.init` names, before any model exists.

  Returns:
    {"params": ..., "batch_stats": ...} on the host, in our paths and layouts, and where they come from.

  Raises:
    ConfigError: nothing there, no checkpoint in that workdir, an unreadable file, or names that are not the scheme's.
  """
  local, scheme = fetch.local_file(init.path, init.scheme)
  path = pathlib.Path(local).expanduser()
  if path.is_dir():
    if init.scheme:
      raise ConfigError(
        f"init.path = {init.path} is a folder, so it must be the workdir of a run, which needs no init.scheme"
        f" ({init.scheme!r}). Leave the scheme empty, or name a file: {files.FORMATS}."
      )
    config_lib.load(path)  # Raises where this is no workdir, before Orbax makes folders in it.
    with Checkpoints(path, read_only=True) as origin:
      step = origin.best_step() or origin.latest_step()
      if step is None:
        raise ConfigError(f"init.path = {path}: no checkpoint in {origin.folder}. Name the workdir of a trained run.")
      return origin.restore_variables(step), f"{path} (step {step})"
  if scheme not in pretrained.SCHEMES:
    raise ConfigError(
      f"init.scheme = {scheme!r}: say whose names the tensors of {init.path} have, one of"
      f" {', '.join(pretrained.SCHEMES)}."
    )
  try:
    origin = str(path) if local == init.path else init.path
    return pretrained.SCHEMES[scheme](files.load_arrays(local)), origin
  except ValueError as error:
    raise ConfigError(f"init.path = {init.path}: {error}") from error


def load_unless_run(config, workdir: pathlib.Path | None) -> tuple[dict, str] | None:
  """The weights of `config.init` where `workdir` holds no run; None where it does. For before anything slow.

  Raises:
    ConfigError: neither a run with a checkpoint nor weights.
  """
  if config.init.path and (workdir is None or not (workdir / config_lib.CONFIG_FILE).exists()):
    return load(config.init)
  config_lib.load(workdir)  # Raises where this is no workdir, before Orbax makes folders in it.
  checkpoint.check_any(workdir)
  return None


def merge(variables: dict, loaded: tuple[dict, str], exclude: tuple[str, ...], count: int = 3) -> tuple[dict, str]:
  """`variables` with the loaded weights in their types, strictly but for `exclude`, and the line to report.

  Args:
    variables: {"params", "batch_stats"} of the model, or their abstract shapes; what is excluded stays as it is.
    loaded: from `load`.
    count: channels of the images, for which a first layer of RGB is adapted, see `channels.adapt`.

  Raises:
    ConfigError: weights that do not fit, all of them listed.
  """
  imported, origin = loaded
  imported, adapted = channels.adapt(variables, imported, count)
  merged, taken, total = pretrained.merge_variables(variables, imported, exclude, origin)
  return merged, f"init: imported {taken} of {total} tensors from {origin}{adapted and f' ({adapted})'}"
