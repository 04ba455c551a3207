"""Weights that anybody can make again from their names: official DeepLab's (its FIXTURES.md, section 2), PyTorch's."""

import hashlib
import math
import pathlib

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 of a variable: one draw from a generator seeded by the name's hash, scaled by what the name ends in."""
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
  draw, leaf = np.random.default_rng(seed), name.split("/")[-1]
  if leaf in ("gamma", "moving_variance"):
    return draw.uniform(0.8, 1.2, shape).astype(np.float32)
  scales = dict(beta=0.05, moving_mean=0.05, biases=0.05)
  if leaf == "depthwise_weights":
    scales[leaf] = np.sqrt(2 / math.prod(shape[:2]))
  if leaf == "weights":
    scales[leaf] = np.sqrt(2 / math.prod(shape[:-1]))
  drawn = draw.standard_normal(shape) * scales[leaf]
  # The residual branches' last convolution is damped, or 16 units would blow the variance up by 9 each.
  return (drawn * 0.2 if name.endswith("separable_conv3_pointwise/weights") else drawn).astype(np.float32)


def variables(table: str) -> dict[str, tuple[tuple[int, ...], str]]:
  """{official name: (shape, first 16 hex digits of the values' SHA-256)} of a network, decoder included.

  Args:
    table: xception41, xception65, xception65_noSC (no separable convolutions), xception71 or mobilenetv2 (no decoder).
  """
  rows = (row.decode().split("\t") for row in np.load(DATA / "tf_deeplab_variables.npz")[table])
  return {name: (tuple(int(n) for n in shape.split("x")), digest) for name, shape, digest in rows}


def arrays(table: str) -> dict[str, np.ndarray]:
  """The values of all variables of a network."""
  return {name: value(name, shape) for name, (shape, _) in variables(table).items()}


def image(height: int, width: int) -> np.ndarray:
  """Raw RGB noise, [1, height, width, 3] float32 in [0, 255)."""
  return np.random.default_rng(0).uniform(0, 255, (1, height, width, 3)).astype(np.float32)


def torch_weights(keys: dict[str, tuple], gain: float) -> dict[str, np.ndarray]:
  """The weight rule of ../shared/reference/torch/FIXTURES.md, section 1."""
  weights = {}
  for key, shape in keys.items():
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
      values = rng.uniform(0.8, 1.2, shape)
    elif leaf in ("bias", "running_mean"):
      values = rng.standard_normal(shape) * 0.05
    else:
      values = rng.standard_normal(shape) * (gain * np.sqrt(2 / np.prod(shape[1:])))
    weights[key] = values.astype(np.float32)
  return weights
