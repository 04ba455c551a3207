"""The scheme `segjax`: our own paths, as `segjax export --format=safetensors` writes them: "params/backbone/conv1/kernel"."""

from collections.abc import Mapping

import numpy as np
from flax import traverse_util

_COLLECTIONS = ("params", "batch_stats")


def names(variables: dict) -> dict[str, np.ndarray]:
  """{path: array} of {"params": ..., "batch_stats": ...}; `convert` takes it back."""
  return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(variables, sep="/").items()}


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
  """{"params": ..., "batch_stats": ...}, both there, of arrays by our paths.

  Raises:
    ValueError: naming all that begin otherwise.
  """
  strange = sorted(name for name in arrays if name.partition("/")[0] not in _COLLECTIONS)
  if strange:
    raise ValueError(f"names that are not segjax' own: {', '.join(strange[:10])}. Choose the scheme whose they are.")
  return {name: {} for name in _COLLECTIONS} | traverse_util.unflatten_dict(dict(arrays), sep="/")
