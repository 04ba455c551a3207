"""Mean and deviation of a run's images (`data.mean`, `data.std`), where its config leaves them to be measured."""

import pathlib

from segjax import config as config_lib
from segjax import input_pipeline
from segjax.config import ConfigError
from segjax.input_pipeline import images, scan
from segjax.run import distributed
from segjax.run.report import say


def resolved(config, workdir: pathlib.Path | None, *, measure: bool):
  """The config with `data.mean` and `data.std` where images have `data.channels`.

  Those of the run in `workdir`, so that it goes on, is scored and predicts with what it was trained on; else, where a new run
  begins, those of its training images.

  Args:
    measure: whether a new run begins. Else, without a run in `workdir`, those of the run that `init.path` names.

  Raises:
    ConfigError: a damaged config in `workdir`, or nothing gives the numbers.
    DataError: what `scan.image_statistics` raises.
  """
  pixels = images.pixels_of(config.data)
  if not pixels.channels or pixels.mean:
    return config
  origins = [workdir] if measure else [workdir, pathlib.Path(config.init.path).expanduser()]
  for origin in origins:
    if origin and (origin / config_lib.CONFIG_FILE).is_file():
      found = images.pixels_of(config_lib.load(origin).data)
      if found.channels == pixels.channels:
        return _with(config, found.mean, found.std)
  if not measure:
    raise ConfigError("data.mean and data.std are not known without a run. Set both; segjax check prints them.")
  source = input_pipeline.make_source(config.data, config.data.train_split)
  mean, std = distributed.on_first(lambda: scan.image_statistics(source, config.data.max_bad_examples))
  say(f"data.mean = {tuple(mean)}, data.std = {tuple(std)}: measured in {len(source)} training images")
  return _with(config, mean, std)


def _with(config, mean, std):
  config = config.copy_and_resolve_references()
  config.data.mean, config.data.std = tuple(mean), tuple(std)
  return config
