"""Data sets: a module reads one of them, or any that is stored in one way.

A new source is a module, and an entry in `SOURCES`; the options of `config.data` are its constructor's arguments.
"""

import dataclasses
import inspect
from collections.abc import Mapping

import numpy as np

from segjax.input_pipeline.images import DataError
from segjax.input_pipeline.sources.cityscapes import CityscapesSource
from segjax.input_pipeline.sources.folder import FolderSource
from segjax.input_pipeline.sources.kitti_road import KittiRoadSource
from segjax.input_pipeline.sources.synthetic import SyntheticSource
from segjax.input_pipeline.sources.tfds_source import TfdsSource
from segjax.input_pipeline.sources.voc import VocSource

SOURCES = {
  "synthetic": SyntheticSource,
  "folder": FolderSource,
  "voc": VocSource,
  "cityscapes": CityscapesSource,
  "tfds": TfdsSource,
  "kitti_road": KittiRoadSource,
}


def arguments(source: type, options: Mapping) -> dict:
  """The arguments of a source's constructor among `options`, which hold a dataclass's fields side by side."""
  found = {}
  for name, parameter in inspect.signature(source).parameters.items():
    if dataclasses.is_dataclass(group := parameter.default):
      found[name] = dataclasses.replace(
        group, **{field.name: options[field.name] for field in dataclasses.fields(group)}
      )
    elif name in options:
      found[name] = options[name]
  return found


def make_source(data, split: str, labels: bool = True):
  """The source of one split from `config.data`.

  Args:
    labels: whether they are needed; predicting works without.

  Raises:
    DataError: the data set cannot be used, or has no public labels for this split; the message says why.
  """
  source = SOURCES[data.name](split=split, **arguments(SOURCES[data.name], data))
  if labels and not source.labelled:
    raise DataError(
      f"Split {split!r} of {data.name} has no public labels, so it can neither train nor be scored here. Write its"
      f" predictions for the benchmark's server: --mode=submit --config.data.eval_split={split}"
    )
  return source


def named_classes(data) -> tuple[tuple[str, ...], np.ndarray]:
  """Class names and palette [K, 3] uint8 of `config.data`, without reading the data set (but its classes.txt).

  Raises:
    DataError: neither the config nor the data set names the classes.
  """
  return SOURCES[data.name].named_classes(**arguments(SOURCES[data.name], data))
