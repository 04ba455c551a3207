"""The data check's command line and its findings."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segjax.input_pipeline import scan
from segjax.tools import check_data
from tests.test_folder import make, source, spoil


def check(tmp_path, *arguments):
  command = [
    sys.executable,
    "-m",
    "segjax.check_data",
    "--config=configs/folder.py",
    f"--config.data.dir={tmp_path}",
    "--config.data.classes=ground,road,car",
    *arguments,
  ]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_prints_shares_and_every_problem_and_fails(tmp_path):
  for split in ("train", "val"):
    make(tmp_path, names=("a", "b", "c"), split=split)
  result = check(tmp_path)
  assert result.returncode == 0 and "no problems found" in result.stdout, result.stderr
  assert "train: 3 examples" in result.stdout and "25.000 %" in result.stdout and "car" in result.stdout
  spoil(tmp_path / "masks/train/b.png")
  Image.fromarray(np.full((6, 8), 9, np.uint8)).save(tmp_path / "masks/train/c.png")
  result = check(tmp_path)
  assert result.returncode == 1 and "2 problem(s) found" in result.stdout
  assert "b.png: damaged or truncated" in result.stdout and "c.png: label values outside" in result.stdout


def test_a_missing_folder_is_a_problem_not_a_crash(tmp_path):
  make(tmp_path)
  result = check(tmp_path)
  assert result.returncode == 1 and "images/val: no such folder" in result.stdout and "Traceback" not in result.stderr


def test_label_statistics_by_hand(tmp_path):
  make(tmp_path, names=("a",))  # 12 pixels each of 0, 1, 2 and void.
  make(tmp_path, names=("b",), mask=np.zeros((6, 8), np.uint8))  # 48 pixels of 0.
  pixels, images_with_class = scan.label_statistics(source(tmp_path))
  assert pixels.tolist() == [60, 12, 12] and images_with_class.tolist() == [84, 36, 36]


def test_probe_notes_classes_that_do_not_occur(tmp_path):
  make(tmp_path, mask=np.zeros((6, 8), np.uint8))
  assert "no pixel of road, car" in scan.probe(source(tmp_path))
  make(tmp_path, mask=np.full((6, 8), 255, np.uint8))
  with pytest.raises(check_data.DataError, match="every pixel is void"):
    scan.probe(source(tmp_path))
