"""The commands of README, docs/ and the pages elsewhere name configs, modules and fields that exist."""

import functools
import importlib.util
import pathlib
import re
import shlex

import pytest

from segjax import config as config_lib
from segjax.config import file as config_file
from segjax.run import commandline
from segjax.tools import verbs
from tests import archives, folder_of_images
from tests import command as in_process

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
  *("README.md", "CONTRIBUTING.md", "launch/README.md"),
  *sorted(
    path.relative_to(ROOT).as_posix() for folder in ("docs", "benchmarks") for path in ROOT.glob(f"{folder}/*.md")
  ),
)
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
# Of loops and shell functions: the command in it, with a value in each variable's place.
SHELL = {
  "compare --": "python -m segjax.benchmark --",
  "${model}": "unet",
  "$cache": "none",
  "[": "",
  "]": "",
  '"$@"': "",
}
COMMANDS = [
  command
  for block in BLOCKS
  for line in block.replace("\\\n", "").splitlines()
  for command in re.findall(
    r"(?:^|&& |do |-c \d |\{ )((?:python -m segjax|segjax|compare) ?[-.].*?|segjax .*?)(?=\s*(?:&&|;|#|$))", line
  )
]


@functools.cache
def _help(module):
  return in_process.run(module, "--help")[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_documentation_is_understood(command, monkeypatch):
  monkeypatch.chdir(ROOT)
  for word, meant in SHELL.items():
    command = command.replace(word, meant)
  words = shlex.split(command)
  if words[0] == "segjax":
    module, mode, _ = verbs.VERBS[words[1]]
    words = ["python", "-m", module, *mode, *words[2:]]
  assert words[:2] == ["python", "-m"] and importlib.util.find_spec(words[2])
  if words[2] == "segjax.prepare":
    assert words[3] in ("voc", "cityscapes", "nuclei", "coco", "labelme")
  names = [word.lstrip("-").partition("=")[0] for word in words[3:] if word.startswith("-")]
  assert all(
    name in ("config", "workdir") or name.startswith("config.") or re.search(rf"--(\[no\])?{name}\b", _help(words[2]))
    for name in names
  )
  argv = words[2:]
  if "config" not in names and "workdir" not in names:
    return
  if "config" not in names:  # It continues the run of another command.
    workdir = next(word for word in words if word.startswith("--workdir="))
    origin = next(c for c in COMMANDS if workdir in c.split() and "--config=" in c)
    argv = [argv[0], next(word for word in origin.split() if word.startswith("--config=")), *argv[1:]]
  # Exits on an unknown file or field.
  commandline._ConfigFile(argv).parse(next(word for word in argv if word.startswith("--config=")).partition("=")[2])


# What makes the runs of the commands small; they are given to each command, as the config of a workdir stays.
TINY = """--config.batch_size=2 --config.crop_size=8,8 --config.model.width=2 --config.model.depth=1 --config.mesh.data=1
--config.optimizer.warmup_steps=0 --config.eval_every=1000 --config.eval.batch_size=2""".split()
GENERATED = "--config.data.image_size=16,16 --config.data.num_train=4 --config.data.num_val=2".split()


RUNNABLE = (
  r"python -m segjax\.(main|check_data|browse|predict|prepare) .*(quickstart|=DATA |runs/mine|runs/a( |$)|voc --arch)"
)


@pytest.mark.full
@pytest.mark.parametrize(
  "page, count",
  [
    ("README.md", 4),
    ("docs/data.md", 4),
    ("docs/browse.md", 1),
    ("docs/use.md", 3),
    ("docs/profiles.md", 1),
    ("docs/papers.md", 1),
  ],
)
def test_commands_of_a_page_that_need_no_large_data_run_one_after_another_as_typed(page, count, tmp_path, tiny_config):
  """But for sizes: those of the quickstart, of one's own images, and of VOC's archives, both generated here."""
  folder_of_images.folder_of_images(tiny_config, tmp_path / "DATA")
  (tmp_path / "IMAGES").symlink_to(tmp_path / "DATA/images/val")
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  (tmp_path / "ARCHIVES").mkdir()
  archives.make_voc(tmp_path / "ARCHIVES")
  blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
  lines = [line.rpartition("&& ")[2] for block in blocks for line in block.splitlines()]
  commands = [line for line in lines if re.match(RUNNABLE, line)]
  assert len(commands) == count
  for command in commands:
    module, *words = shlex.split(command.replace("=ground,cell", "=ground,cell,rim"))[2:]
    if module == "segjax.prepare":
      words.append("--allow_partial")
    elif module != "segjax.predict":
      words += TINY + GENERATED * (page != "docs/data.md" and "DATA" not in command)
      words += ["--config.num_steps=4"] * ("num_steps" not in command and "--mode" not in command)
    code, out, err = in_process.run(module, *words, cwd=tmp_path)
    assert code == 0, f"{command}\n{out[-2000:]}\n{err[-2000:]}"


def test_verbs_and_shipped_configs_that_the_documentation_names_exist():
  text = TEXT
  named = re.findall(r"`segjax ([\w-]+)", text)
  assert len(named) > 3 and set(named) <= set(verbs.VERBS)
  assert set(re.findall(r"--config=(\w+)(?![\w/.])", text)) - {"NAME"} <= set(config_file.SHIPPED)


def test_options_that_the_documentation_names_exist():
  options = set(re.findall(r"`--config\.([\w.]+)=|(?<= )--config\.([\w.]+)=", TEXT))
  named = {name for pair in options for name in pair if name}
  known = {
    field
    for model in config_lib.MODELS
    for data in config_lib.SOURCES
    for field in config_lib.fields(config_lib.default_config(model=model, data=data))
  }
  assert len(named) > 20 and len(COMMANDS) >= 10
  assert named <= known
