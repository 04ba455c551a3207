"""Which suite a case belongs to: see the markers in pyproject.toml."""

import pytest

SUITES = ("full", "slow", "reference", "faults", "fuzz", "accelerators")


def full(*cases) -> list:
  """The cases of `parametrize`, each a value or a tuple of values, that only `pytest -m full` runs."""
  return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full) for case in cases]
