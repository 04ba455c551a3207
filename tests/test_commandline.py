"""The commands' own manners: config files from anywhere, mistakes that end in a message, and what --help says."""

import ast
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from segjax import config as config_lib
from segjax.config import ConfigError, default_config
from segjax.config import file as config_file
from segjax.config import rules as config_rules
from segjax.run import commandline
from tests import command

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_every_shipped_config_loads_from_any_working_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
  before = set(sys.modules)
  for path in CONFIGS:
    assert config_file.load(str(path)).num_steps > 0, path
    assert config_file.load(os.path.relpath(path)).is_locked
  assert not [name for name in set(sys.modules) - before if "config" in name]


@pytest.mark.parametrize("statement", ["import base", "from . import base", "from mine import base"])
def test_a_config_imports_its_own_neighbour_and_no_other_folders(statement, tmp_path):
  for folder, steps in (("a/mine", 7), ("b/mine", 8)):
    (tmp_path / folder).mkdir(parents=True)
    text = f"from segjax.config import default_config\nconfig = default_config()\nconfig.num_steps = {steps}\n"
    (tmp_path / folder / "base.py").write_text(text)
    (tmp_path / folder / "own.py").write_text(f"{statement}\ndef get_config(): return base.config\n")
    search = list(sys.path)
    assert config_file.load(str(tmp_path / folder / "own.py")).num_steps == steps
    assert sys.path == search


@pytest.mark.parametrize(
  "text, message",
  [
    ("x = (", r"own.py, line 1: SyntaxError: '\(' was never closed"),
    ("import nothing_here", r"own.py, line 1: ModuleNotFoundError: No module named 'nothing_here'"),
    ("def get_config():\n  return 1 / 0", "own.py, line 2: ZeroDivisionError: division by zero"),
    ("def get_config(): return 3", "own.py: no config of segjax, which begins with"),
    ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()", "no config of segjax"),
    ("", "own.py defines no function get_config"),
    (
      "from segjax.config import default_config\ndef get_config():\n  config = default_config()\n  config.num_step = 3",
      r"own.py, line 4: AttributeError: .*locked. Did you mean .num_steps.",
    ),
  ],
)
def test_a_mistake_in_a_config_file_is_named_with_its_line(text, message, tmp_path):
  (tmp_path / "own.py").write_text(text)
  with pytest.raises(ConfigError, match=message) as error:
    config_file.load(str(tmp_path / "own.py"))
  assert len(str(error.value)) < 400


def test_what_is_no_config_file_says_what_to_give(tmp_path):
  config_lib.save(default_config(), tmp_path)
  for name in (tmp_path, tmp_path / "config.json"):
    with pytest.raises(ConfigError, match=f"--workdir={tmp_path} takes without --config"):
      config_file.load(str(name))
  for name in ("", str(tmp_path / "none.py"), os.devnull):
    with pytest.raises(ConfigError, match="Name a Python file, e.g. --config=configs/quickstart.py"):
      config_file.load(name)


def test_a_damaged_saved_config_is_named_by_its_own_file(tmp_path):
  (tmp_path / "config.json").write_text("[")
  with pytest.raises(ConfigError, match=f"^{tmp_path}/config.json: not a saved config"):
    config_file.load(f"{config_lib.__file__}:{tmp_path}")


def test_a_model_of_another_name_is_refused_by_the_rules_not_by_its_constructor():
  config = default_config(model="unet", data="synthetic")
  config.model.name = "fcn"
  with pytest.raises(
    ConfigError, match=r"model.name = 'fcn'.*unknown \['model.auxiliary', 'model.batch_norm'.*default_config"
  ):
    config_rules.validate(config)


def test_the_home_folder_may_stand_in_every_path(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  config = default_config(data="synthetic")
  config.data.dir, config.init.path = "~/data", "~/w.npz"
  config = config_lib.finalize(config)
  assert (config.data.dir, config.init.path) == ("/home/me/data", "/home/me/w.npz")
  assert commandline._Path().parse("~/run") == "/home/me/run"
  with pytest.raises(ConfigError, match="~nobody-here/x: no such user"):
    commandline._Path().parse("~nobody-here/x")


def test_flags_with_a_space_and_from_anywhere_and_mistakes_end_with_code_2(tmp_path):
  quickstart = str(ROOT / "configs/quickstart.py")
  for arguments, message in (
    (("--config", str(ROOT / "configs/fcn8_camvid_half.py"), "--config.data.dir", "/x"), "data.dir = /x: no such"),
    (("--config", quickstart, "--config.num_step", "3"), "config.num_step: no such field. Did you mean num_steps?"),
    (("--config", quickstart, "more"), "unknown argument 'more'"),
    ((f"--config={quickstart}", f"--config={quickstart}"), "--config is given 2 times"),
    (("--flagfile=none",), "Unable to open flagfile"),
  ):
    code, _, err = command.run("segjax.main", "--workdir=run", *arguments, cwd=tmp_path)
    assert code == 2 and message in err and "Traceback" not in err, err
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("module, flags", [("main", ("config", "workdir", "mode")), ("prepare", ("archives", "out"))])
def test_help_names_the_flags_and_succeeds(module, flags):
  code, out, _ = command.run(f"segjax.{module}", "--help")
  assert code == 0 and all(f"--{name}:" in out for name in flags), out


@pytest.mark.parametrize("module", ["train", "evaluate", "submission", "dry_run"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_a_module_that_is_no_command_says_what_is_and_fails(module, capsys):
  with pytest.raises(SystemExit) as end:
    runpy.run_module(f"segjax.{module}", run_name="__main__")
  assert end.value.code == 2 and "Run: python -m segjax.main" in capsys.readouterr().err


def test_help_that_nobody_reads_to_its_end_says_nothing():
  line = f"set -o pipefail; {sys.executable} -m segjax.check_data --help | head -1"
  result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, cwd=ROOT)
  assert (result.returncode, result.stderr.count("Traceback")) == (0, 0), result.stderr


def test_every_progress_bar_says_what_it_does_and_what_it_counts():
  calls = []
  for path in (ROOT / "segjax").rglob("*.py"):
    calls += [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
  bars = [node for node in calls if ast.unparse(node.func) == "tqdm.tqdm"]
  for bar in bars:
    units = [keyword.value.value for keyword in bar.keywords if keyword.arg == "unit"]
    assert len(bar.args) >= 2 and units in ([" images"], [" files"]), ast.unparse(bar)
  assert len(bars) >= 6
