"""Predictions of a split as files, in the format of a benchmark's server. Other images: predict.py."""

import pathlib
import shutil
import tarfile
import uuid
import zipfile

import jax
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image

from segjax import input_pipeline
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.run import distributed, evaluation, image_statistics, outputs, pictures, report, warm_start


def submit(config, workdir) -> pathlib.Path:
  """--mode=submit: writes predictions for `config.data.eval_split`, with labels or without, and packs them.

  Where `workdir` holds no run, the weights that `config.init` names predict.

  Returns:
    The archive, `workdir`/predict_SPLIT/results.tgz or .zip; the files in it lie beside it. Both replace those of an
    earlier call, once they are complete.

  Raises:
    ConfigError: no run or no checkpoint in `workdir`, one of another model, a batch or canvas that the mesh does not
      divide, files in predict_SPLIT that are no results, or files that cannot be written.
    DataError: the split cannot be used, or names of examples cannot be those of files.
  """
  workdir = pathlib.Path(workdir)
  loaded = warm_start.load_unless_run(config, workdir)
  config = image_statistics.resolved(config, workdir, measure=False)
  experiment = Experiment(config, labels=False)
  split, source, mesh = config.data.eval_split, experiment.eval_source, experiment.mesh
  final, archive = outputs.output_path(workdir, f"predict_{split}"), f"results.{source.submission.archive}"
  paths = [result_path(source, index).as_posix() for index in range(len(source))]
  outputs.check_outputs(final, paths)
  report.say(report.data_lines(config.data, {split: source}))
  input_pipeline.cache.check_room(config.data.cache, (source,))
  results = {archive, *paths}
  distributed.on_first(lambda: _check_replaceable(final, results))
  variables, _, origin = experiment.trained_variables(workdir, loaded)
  step = experiment.evaluator.step

  try:
    folder = workdir / distributed.on_first(lambda: f"{final.name}.{uuid.uuid4().hex}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    try:
      batches = evaluation.make_batches(config, source, mesh)
      for index, out in evaluation.predictions(step, variables, batches, mesh):
        write_png(folder / result_path(source, index), out["prediction"], source)
      _wait_for_all("predict: files")
      if jax.process_index() == 0:
        pack(folder, folder / archive)
        _replace(final, folder, results)
    finally:
      if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
  except OSError as error:
    raise ConfigError(f"{final} cannot be written ({error}). Free the space, or check --workdir.") from error
  if jax.process_index() == 0:
    print(
      f"{split}: {len(source)} predictions, {origin}\nfiles: {final / source.submission.folder}"
      f"\nfor the server: {final / archive}",
      flush=True,
    )
  return final / archive


def _check_replaceable(final: pathlib.Path, results: set[str]) -> None:
  """Raises ConfigError where `final` holds anything that is not one of `results`, paths relative to it."""
  other = [final] if final.is_symlink() or final.is_file() else sorted(final.rglob("*"))
  for path in other:
    if path.is_symlink() or not (path.is_dir() or path.relative_to(final).as_posix() in results):
      raise ConfigError(
        f"{final} is the folder of predictions, and {path} is not one of them. Move it elsewhere; nothing was deleted."
      )


def _replace(final: pathlib.Path, folder: pathlib.Path, results: set[str]) -> None:
  """Puts `folder` in the place of `final`, of which `results` are deleted and nothing else."""
  _check_replaceable(final, results)  # Again: predicting takes a while.
  if final.exists():
    for result in results:
      (final / result).unlink(missing_ok=True)
    for path in (*sorted(final.rglob("*"), reverse=True), final):  # What a folder holds comes before it.
      path.rmdir()
  folder.rename(final)


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def result_path(source, index: int) -> pathlib.PurePosixPath:
  """Of a prediction, inside the archive."""
  target = source.submission
  return outputs.output_path(pathlib.PurePosixPath(target.folder), f"{source.describe(index)}{target.suffix}")


def write_png(path: pathlib.Path, prediction: np.ndarray, source) -> None:
  """[h, w] class ids as the PNG that the source's `submission` describes."""
  target = source.submission
  ids = np.array(target.ids, np.uint8)[prediction] if target.ids else prediction
  path.parent.mkdir(parents=True, exist_ok=True)
  image = pictures.indexed_image(ids, pictures.color_table(source.palette)) if target.indexed else Image.fromarray(ids)
  image.save(path)


def pack(folder: pathlib.Path, archive: pathlib.Path) -> None:
  """All PNGs below `folder` into a .tgz or .zip, under their paths relative to it."""
  paths = sorted(folder.rglob("*.png"))
  if archive.suffix == ".tgz":
    with tarfile.open(archive, "w:gz") as file:
      for path in paths:
        file.add(path, path.relative_to(folder).as_posix())
  else:
    with zipfile.ZipFile(archive, "w") as file:  # Stored: PNGs are compressed already.
      for path in paths:
        file.write(path, path.relative_to(folder).as_posix())


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("main --mode=submit --workdir=RUN")
