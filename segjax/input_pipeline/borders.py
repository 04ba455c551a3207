"""Where instances nearly touch: the map that makes a network learn the ground between them (U-Net, arXiv 1505.04597).

Free of JAX, like everything that data workers import.
"""

import os
import pathlib
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from segjax.input_pipeline import cache


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
  """`border_map` of a file's instances, [H, W] float16, computed once: kept by `cache.arrays`, in borders/.

  Args:
    path: the file that `read()` -> instances [H, W] reads.
    meaning: how it does so.

  Raises:
    DataError: the file is gone.
    ConfigError: the cache folder cannot be made or trusted.
  """
  name = f"{os.path.abspath(path)}|{meaning}|{sigma}"
  (weight,) = cache.arrays(
    "borders", name, cache.file_state(path), lambda: (border_map(read(), sigma).astype(np.float16),)
  )
  return weight
