"""2,600 damaged files through the readers that users' files go through: pytest -m fuzz -s. Seeded, so each is repeatable."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.fuzz_readers import KINDS, SECONDS

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = dict(
  jpeg=250,
  png=250,
  gif=150,
  tiff=100,
  lists=150,
  config=250,
  task=50,
  npz=150,
  safetensors=150,
  pth=150,
  tf_checkpoint=100,
  frozen_graph=100,
  checkpoint=50,
  tflite=100,
  rasters=300,
  annotations=300,
)


def test_counts_are_of_all_kinds_and_sum_to_2600():
  assert COUNTS.keys() == KINDS.keys() and sum(COUNTS.values()) == 2600


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", COUNTS)
def test_each_damaged_file_is_read_or_refused_with_a_message(kind, tmp_path):
  """In a process of its own, which must live to its end: no crash, no hang, no other exception, no memory."""
  if kind in ("pth", "safetensors", "tflite"):
    pytest.importorskip({"pth": "torch", "tflite": "ai_edge_litert"}.get(kind, kind))
  if kind in ("tf_checkpoint", "frozen_graph"):
    pytest.importorskip("tensorflow")
  command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz_readers", kind, str(COUNTS[kind]), str(tmp_path)]
  run = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=60 + SECONDS + COUNTS[kind]
  )
  assert run.returncode == 0, run.stdout[-200:] + run.stderr[-4000:]
  found = json.loads(run.stdout.splitlines()[-1])
  print(f"{kind}: {found}")
  assert not found["faults"], "\n".join(found["faults"][:10])
  assert found["read"] + found["refused"] == COUNTS[kind] and found["read"] and found["refused"]
  assert found["growth_mib"] < 1500  # An image of MAX_PIXELS whose few bytes end too early takes 1 GiB.
