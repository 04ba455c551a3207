"""Weights that anybody can make again from the official variable names (FIXTURES.md, section 2)."""

import hashlib
import math
import pathlib

import numpy as np

REFERENCE = pathlib.Path(__file__).parents[2] / "shared" / "reference"
DATA = pathlib.Path(__file__).parent / "data"


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """float32 of a variable: one draw from a generator seeded by the name's hash, scaled by what the name ends in."""
  seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
  draw, leaf = np.random.default_rng(seed), name.split("/")[-1]
  if leaf in ("gamma", "moving_variance"):
    return draw.uniform(0.8, 1.2, shape).astype(np.float32)
  scales = dict(depthwise_weights=math.sqrt(2 / math.prod(shape[:2])), beta=0.05, moving_mean=0.05, biases=0.05)
  if leaf == "weights":
    # The residual branches' last convolution is damped, or 16 units would blow the variance up by 9 each.
    scales["weights"] = math.sqrt(2 / math.prod(shape[:-1])) * (0.2 if "separable_conv3_pointwise/" in name else 1)
  return (draw.standard_normal(shape) * scales[leaf]).astype(np.float32)


def table(name: str) -> dict[str, dict[str, str]]:
  """Variable table `name`.tsv as {variable: {column: text}}, from tests/data or the reference; {} where absent."""
  for path in (DATA / f"{name}.tsv", REFERENCE / "deeplab" / f"{name}.tsv"):
    if path.is_file():
      header, *rows = (line.split("\t") for line in path.read_text().splitlines())
      return {row[0]: dict(zip(header, row)) for row in rows}
  return {}


def shape(row: dict[str, str]) -> tuple[int, ...]:
  return tuple(int(n) for n in row["shape"].split("x"))


def arrays(name: str) -> dict[str, np.ndarray]:
  """All seeded values of a variable table."""
  return {variable: value(variable, shape(row)) for variable, row in table(name).items()}
