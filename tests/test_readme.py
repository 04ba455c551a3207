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
from tests.marks import SUITES

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
  *("README.md", "CONTRIBUTING.md", "launch/README.md"),
  *sorted(
    path.relative_to(ROOT).as_posix() for folder in ("docs", "benchmarks") for path in ROOT.glob(f"{folder}/*.md")
  ),
)
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
DEVELOPERS_PAGES = (
  "CONTRIBUTING.md",
  "launch/README.md",
  *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/*.md")),
)
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


def commands_of(page):
  """The commands of a page, in words: loops opened, `compare` (a function of the shell) written out."""
  compare = ""
  for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
    for line in block.replace("\\\n", " ").splitlines():
      if line.startswith("compare() {"):
        compare = line.removeprefix("compare() {").rpartition(";")[0]
        continue
      if line.startswith("compare "):
        line = compare.replace('"$@"', line.removeprefix("compare "))
      for command in re.split("&&|;", re.sub(r"\[(--[^]]+)\]", r"\1", line)):
        words = shlex.split(command, comments=True)
        if start := [n for n, word in enumerate(words) if word in ("python", "pytest", "bash") or "launch/" in word]:
          yield words[start[0] :]


@functools.cache
def options_of(program):
  """The options that a program has; those of a script of launch/ go to training."""
  if program.endswith(".py"):
    return set(re.findall(r'add_argument\(\s*"--(\w+)"', (ROOT / program).read_text()))
  _, text, _ = in_process.run("segjax.main" if "/" in program else program, "--help")
  return set(re.findall(r"(?m)^\s+--(?:\[no\])?(\w+)", text)) | {"config"}


@pytest.mark.parametrize("page", DEVELOPERS_PAGES)
def test_commands_for_developers_name_programs_options_and_fields_that_exist(page):
  for words in commands_of(page):
    if words[0] == "pytest":
      assert "-m" not in words or words[words.index("-m") + 1] in SUITES, words
      continue
    program = words[2] if words[1] == "-m" else words[0] if "launch/" in words[0] else words[1]
    assert importlib.util.find_spec(program) if words[1] == "-m" else (ROOT / program).is_file(), words
    given = [word[2:].partition("=") for word in words if word.startswith("--")]
    assert {name for name, *_ in given if not name.startswith("config.")} <= options_of(program), words
    for path in (value for name, _, value in given if name == "config"):
      path, *_ = ROOT.glob(re.sub(r"\$\{?\w+\}?", "*", path))
      argv = [program, f"--config={path}", *(word for word in words if word.startswith("--config."))]
      commandline._ConfigFile(argv).parse(str(path))  # Exits on an unknown file or field.


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
  named = re.findall(r"`segjax ([\w-]+)", TEXT)
  assert len(named) > 3 and set(named) <= set(verbs.VERBS)
  assert set(re.findall(r"--config=(\w+)(?![\w/.])", TEXT)) - {"NAME"} <= set(config_file.SHIPPED)


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
