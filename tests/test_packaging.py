"""The files around the package agree with it."""

import pathlib
import re
import subprocess

import pytest
import yaml

import segjax

ROOT = pathlib.Path(__file__).parents[1]
SETUP = (ROOT / "setup.py").read_text()


def test_citation_and_changes_are_of_this_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # What the format demands.
  assert citation["version"] == segjax.__version__ and citation["license"] in SETUP
  assert re.search(r"(?m)^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text())[1] == segjax.__version__


def test_pre_commit_has_the_ruff_of_the_tests():
  (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
  assert f'"ruff=={repo["rev"].removeprefix("v")}"' in SETUP


def test_types_are_part_of_the_package():
  assert (ROOT / "segjax/py.typed").is_file() and '"segjax": ["py.typed", ' in SETUP


def test_the_image_starts_what_the_jobset_starts_and_takes_extras_that_exist():
  text = (ROOT / "Dockerfile").read_text()
  (container,) = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"][
    "spec"
  ]["template"]["spec"]["containers"]
  assert re.search(r"(?m)^ENTRYPOINT (.*)$", text)[1] == str(container["command"]).replace("'", '"')
  extras = set(re.findall(r"EXTRA=(\w+)", text + (ROOT / "launch/jobset.yaml").read_text()))
  assert extras and all(f'"{extra}": [' in SETUP for extra in extras)
  instructions = [line.split()[0] for line in text.splitlines() if line and line[0] != "#"]
  assert instructions == ["ARG", "FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"]


@pytest.mark.parametrize(
  "extra, target", [("", "."), ("cuda12", ".[cuda12]"), ("cuda12,tensorflow", ".[cuda12,tensorflow]")]
)
def test_the_image_installs_what_pip_takes_with_and_without_an_extra(extra, target):
  """Pip refuses `.[]`."""
  (command,) = re.findall(r"(?m)^RUN pip (.*)$", (ROOT / "Dockerfile").read_text())
  shell = subprocess.run(
    ["sh", "-c", f"printf '%s\\n' {command}"], env={"EXTRA": extra}, capture_output=True, text=True, check=True
  )
  assert shell.stdout.splitlines() == ["install", "--no-cache-dir", "-e", target]
