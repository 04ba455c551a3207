"""The figures of benchmarks/accelerators.json: pytest -m accelerators makes some again, minutes each."""

import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[1] / "benchmarks" / "accelerators.py"
SPEC = importlib.util.spec_from_file_location("accelerators", PATH)
accelerators = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(accelerators)

GROWTH = 1.03
AGAIN = ["fcn8s train bfloat16 gpu:h100", "unet64 train bfloat16 gpu:h100"]


def grown(before: dict, after: dict) -> dict:
  """{name: (before, after)} of the numbers that have grown by more than 3 %, from 0 where there were none."""
  pairs = {name: (before[name] if name in before else 0, n) for name, n in after.items()}
  return {name: (old, new) for name, (old, new) in pairs.items() if new > GROWTH * old}


def numbers(row: dict) -> dict:
  """The numbers of a row that are not to grow, flat."""
  collectives = {
    f"{kind} {part}": n for kind, pair in row["collectives"].items() for part, n in zip(("count", "bytes"), pair)
  }
  names = ("hbm_bytes", "peak_bytes", "fusions", "cycles")
  return {name: row[name] for name in names} | collectives | {"flops": sum(row["flops"].values())}


@pytest.mark.accelerators
@pytest.mark.parametrize("name", AGAIN)
def test_no_number_has_grown_by_more_than_3_percent(name):
  before = accelerators.load()
  assert name in before, f"python benchmarks/accelerators.py --only='{name}'"
  try:
    after = accelerators.measure_apart(name)
  except RuntimeError as error:
    if "not installed" not in str(error):
      raise
    pytest.skip(str(error))
  assert not grown(numbers(before[name]), numbers(after))


def test_growth_is_told_by_number_and_collectives_of_a_new_kind_are():
  row = dict(
    hbm_bytes=100, peak_bytes=100, fusions=100, cycles=0, flops={"bf16": 100}, collectives={"all-reduce": [4, 100]}
  )
  assert grown(numbers(row), numbers(row)) == {}
  worse = row | dict(hbm_bytes=104, peak_bytes=103, collectives={"all-reduce": [5, 90], "all-gather": [1, 8]})
  assert grown(numbers(row), numbers(worse)) == {
    "hbm_bytes": (100, 104),
    "all-reduce count": (4, 5),
    "all-gather count": (0, 1),
    "all-gather bytes": (0, 8),
  }
