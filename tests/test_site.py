"""The documentation site: builds without a warning, reads nothing from elsewhere, has every page; figures are the committed ones."""

import hashlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NETWORKS = {"Xception-65": "xception65", "MobileNetV2": "mobilenetv2", "U-Net-64": "unet64", "FCN-8s": "fcn8s"}


def test_every_page_is_in_the_navigation():
  lines = (ROOT / "mkdocs.yml").read_text()
  named = set(re.findall(r": ([\w/]+\.md)$", lines, re.MULTILINE))
  pages = {path.name for path in ROOT.glob("docs/*.md")} | {
    "index.md",
    "contributing.md",
    "changelog.md",
    "launch/README.md",
  }
  assert named == pages | {f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/*.md")}


def test_costs_of_the_models_are_the_counted_ones():
  counted = json.loads((ROOT / "benchmarks/accelerators.json").read_text())
  rows = re.findall(r"(?m)^\| (.+?) \| (\d+) of .*? \| (.+) \|$", (ROOT / "docs/choose.md").read_text())
  assert len(rows) == len(NETWORKS)
  for name, _, figures in rows:
    row = counted[f"{NETWORKS[name.removeprefix('DeepLabV3+ ')]} train bfloat16 gpu:h100"]
    least = 1e3 * max(row["hbm_seconds"], row["matrix_seconds"])
    products = sum(row["flops"].values()) / 1e12
    gigabytes = [f"{row[name] / 1e9:.1f}" for name in ("hbm_bytes", "peak_bytes")]
    assert figures.split(" | ") == [gigabytes[0], f"{products:.2f}", gigabytes[1], f"{least:.1f}"]


def test_what_proves_the_papers_exists():
  for page in ("papers.md", "evaluation.md"):
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`(?:tests/)?(test_\w+\.py)`", text)) | {
      f"../configs/{c}" for c in re.findall(r"`(\w+_\w+\.py)`", text)
    }
    named = {name for name in named if not name.startswith("../configs/test_")}
    assert named and all((ROOT / "tests" / name).is_file() for name in named)


def test_pictures_of_diagrams_are_of_todays_text():
  for page in ROOT.glob("docs/*.md"):
    for text in re.findall(r"(?s)```mermaid\n(.*?)```", page.read_text()):
      assert hashlib.sha256(text.encode()).hexdigest() in page.with_suffix(".svg").read_text()


@pytest.mark.full
@pytest.mark.skipif(
  importlib.util.find_spec("mkdocstrings") is None, reason="mkdocs is not installed (pip install -e '.[docs]')"
)
def test_the_site_builds_strictly_loads_nothing_from_elsewhere_and_its_links_name_pages(tmp_path):
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
  pages = list(tmp_path.rglob("*.html"))
  assert len(pages) > 20 and "default_config" in (tmp_path / "api.html").read_text()
  for page in pages:
    assert not re.findall(
      r"<(?:script|img|link)[^>]* (?:src|href)=\"?https?:[^> ]*(?:js|css|png|svg|woff2)", page.read_text()
    )
    assert not re.findall(r"<a [^>]*>[^<]*\.md</a>", page.read_text())
