"""Where instances nearly touch: the map that makes a network learn the ground between them (U-Net, arXiv 1505.04597).

Free of JAX, like everything that data workers import.
"""

import hashlib
import pathlib
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from segjax import atomic, user_cache
from segjax.input_pipeline.images import DataError


def border_map(instances: np.ndarray, sigma: float) -> np.ndarray:
  """exp(-(d1 + d2)^2 / (2 sigma^2)) of the ground between instances (equation 2 without its weights).

  Args:
    instances: [H, W] int, 0 = no instance.
    sigma: pixels.

  Returns:
    [H, W] float32 in [0, 1]; d1 and d2 are the Euclidean distances to the nearest and the second nearest instance. 0 on
    instances themselves, where fewer than two are there, and beyond 6 sigma, where it would be below 2e-8.
  """
  reach = int(np.ceil(6 * sigma)) + 1
  nearest, second = (np.full(instances.shape, np.inf, np.float32) for _ in range(2))
  for number, box in enumerate(ndimage.find_objects(instances), start=1):
    if box is None:
      continue
    window = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
    distance = ndimage.distance_transform_edt(instances[window] != number).astype(np.float32)
    before, runner_up = nearest[window], second[window]
    second[window] = np.minimum(np.maximum(before, distance), runner_up)
    nearest[window] = np.minimum(before, distance)
  weight = np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
  return np.where((instances == 0) & (nearest + second <= 6 * sigma), weight, 0).astype(np.float32)


def cached_border_map(path: pathlib.Path, meaning: str, read: Callable[[], np.ndarray], sigma: float) -> np.ndarray:
  """`border_map` of a file's instances, [H, W] float16, computed once.

  It is kept in the user's cache folder, in borders/, under a name that follows from the file's path, size and
  time of change, from its meaning and from sigma.

  Args:
    path: the file that `read()` -> instances [H, W] reads.
    meaning: how it does so.

  Raises:
    DataError: the file is gone, or the cache is full.
    ConfigError: the cache's folder is not to be had.
  """
  try:
    state = path.stat()
  except OSError as error:
    raise DataError(f"{path}: cannot be read ({error.strerror}). Restore it, or set loss.border_weight = 0.") from error
  key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{meaning}|{sigma}"
  folder = user_cache.folder("borders")
  cached = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
  if cached.is_file():
    return np.load(cached)
  weight = border_map(read(), sigma).astype(np.float16)
  try:
    with atomic.whole_file(cached) as file:  # Several threads or runs may compute the same map.
      np.save(file, weight)
  except OSError as error:
    raise DataError(f"{folder} cannot be written ({error}). Set XDG_CACHE_HOME to a folder that can.") from error
  return weight
