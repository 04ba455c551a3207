"""What a run makes of how often each class occurs in its training labels: weights in the loss, and draws of examples."""

import pathlib

import numpy as np

from segjax import input_pipeline, losses
from segjax.config import ConfigError
from segjax.input_pipeline import order, scan
from segjax.run import distributed


def class_weights(source, weights: tuple, workdir: pathlib.Path) -> np.ndarray | None:
  """[K] float32 or None, from `config.loss.class_weights`; statistics of the labels are cached in the workdir.

  Raises:
    ConfigError: another number of weights than classes, or a class that never occurs.
  """
  if not weights:
    return None
  if not isinstance(weights[0], str):
    if len(weights) != len(source.classes):
      raise ConfigError(f"loss.class_weights has {len(weights)} numbers for {len(source.classes)} classes.")
    return np.asarray(weights, np.float32)
  cache = workdir / "label_statistics.json"
  pixels, images_with_class = map(np.asarray, distributed.on_first(lambda: scan.cached_statistics(source, cache)))
  try:
    return losses.class_weights(weights[0], pixels, images_with_class)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def balance(source, data) -> order.ClassBalance | None:
  """How often each training example is drawn under `data.sampling`; None: once an epoch. The same on every process.

  Raises:
    ConfigError: a class that never occurs.
    DataError: a label that cannot be read.
  """
  if data.sampling == "uniform":
    return None
  counts = distributed.on_first(lambda: scan.class_counts(source).tolist())
  return input_pipeline.class_balance(source, data, np.asarray(counts))


def of_crops(num_classes: int, balance: order.ClassBalance | None) -> np.ndarray:
  """[K] how probable each class is to be in a foreground crop, see `augment.foreground.choose_pixel`."""
  if balance is not None:
    return balance.probabilities
  return np.r_[0.0, np.ones(num_classes - 1)]


def line(source, balance: order.ClassBalance) -> str:
  """How often each class is drawn, rarest draws last."""
  shares = sorted(zip(balance.probabilities, source.classes), reverse=True)
  return "classes are drawn (data.sampling): " + ", ".join(f"{name} {100 * share:.1f} %" for share, name in shares)
