"""What README and benchmarks/results.md say that trainings reached is what their committed logs hold."""

import json
import pathlib
import re

from benchmarks import results
from segjax.config import default_config, fields
from segjax.config import file as config_file

ROOT = pathlib.Path(__file__).parents[1]
RUNS = sorted(results.FOLDER.iterdir())


def test_the_tables_are_made_of_the_logs():
  text = (ROOT / "benchmarks/results.md").read_text()
  assert len(RUNS) >= 4 and results.table() in text
  assert all(results.class_table(data) in text for data in results.CLASSES)


def test_every_score_in_the_readme_has_its_log():
  section = re.search(r"(?s)## Measured\n(.*?)\n## ", (ROOT / "README.md").read_text())[1]
  rows = re.findall(r"(?m)^\| .*?\(benchmarks/results/(\w+)\) \| (.*?) \|", section)
  assert len(rows) == len(re.findall(r"(?m)^\| ", section)) - 1 >= 3  # All but the head.
  for name, told in rows:
    kind, value, _ = results.score(results.FOLDER / name)
    assert told == f"{kind} {value:.3f}"


def test_a_log_is_of_its_config_and_whole():
  """It ends with an evaluation, and its config, whose fields may be those of an earlier version, has those of its recipe."""
  for run in RUNS:
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["dir"] == "DATA" and len(json.loads((run / "run.json").read_text())["commit"]) == 40
    last = results.evaluations(run)[-1]
    assert last["step"] == max(line["step"] for line in results.lines(run)) <= config["num_steps"]
    trained, _, seed = run.name.partition("_seed")
    assert config["seed"] == int(seed or 0)
    name, _, variant = trained.partition("_half_")
    recipe = f"{name}_half:{variant}" if variant else trained
    recipe = f"deeplab_voc_part:{run.name.rpartition('_')[2]}" if run.name.startswith("voc_part") else recipe
    wanted = config_file.load(recipe)
    assert config["model"]["name"] == wanted.model.name and config["crop_size"] == list(wanted.crop_size)
    assert set(config) <= {field.partition(".")[0] for field in fields(default_config(wanted.model.name, "folder"))}
