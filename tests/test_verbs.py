"""The console command, and the shipped configs by name: from any folder, from a checkout as when installed."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.config import file as config_file
from segjax.tools import verbs
from tests import command as in_process

ROOT = pathlib.Path(__file__).parents[1]


def run(*arguments, cwd, path=ROOT):
  environ = os.environ | {"PYTHONPATH": str(path)}
  command = [sys.executable, *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ, check=False)


@pytest.fixture
def command(monkeypatch):
  """Calls the command; returns the module that it would run, and its command line."""
  called = []
  monkeypatch.setattr(runpy, "run_module", lambda name, **options: called.append((name, sys.argv[1:])))

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["segjax", *arguments])
    verbs.main()
    return called.pop() if called else None

  return call


def test_a_verb_is_its_module_with_the_same_arguments(command):
  for verb in ("train", "eval", "submit", "config"):
    assert command(verb, "--workdir=x", "a") == ("segjax.main", [f"--mode={verb}", "--workdir=x", "a"])
  assert command("dry-run") == ("segjax.main", ["--mode=dry_run"])
  for verb, module in (
    ("predict", "predict"),
    ("check", "check_data"),
    ("browse", "browse"),
    ("prepare", "prepare"),
    ("benchmark", "benchmark"),
  ):
    assert command(verb, "--a", "b") == (f"segjax.{module}", ["--a", "b"])


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_command_alone_lists_each_verb_on_a_line(arguments, command, capsys):
  assert command(*arguments) is None
  lines = capsys.readouterr().out.splitlines()
  for verb in ("train", "eval", "predict", "submit", "check", "browse", "prepare", "dry-run", "benchmark", "config"):
    assert sum(line.split()[:1] == [verb] and len(line.split()) > 3 for line in lines) == 1, verb


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["trian"], "no verb 'trian'. Did you mean train?"),
    (["dry_run"], "Did you mean dry-run?"),
    (["--config=quickstart"], "The verbs: train, eval"),
    (["eval", "--mode=train"], "segjax eval takes no --mode"),
    (["eval", "--mode", "train"], "segjax eval takes no --mode"),
  ],
)
def test_a_wrong_verb_ends_with_code_2_and_says_which_there_are(arguments, message, command, capsys):
  with pytest.raises(SystemExit) as end:
    command(*arguments)
  assert end.value.code == 2 and message in capsys.readouterr().err


def test_help_of_every_verb_succeeds_with_its_own_flags(tmp_path):
  texts = {}
  for verb in verbs.VERBS:
    code, texts[verb], err = in_process.run("segjax.verbs", verb, "--help", cwd=tmp_path)
    assert code == 0, (verb, err)
  own = dict(train="workdir", config="config", predict="tile", prepare="archives", benchmark="what", browse="samples")
  for verb, flag in own.items():
    assert f"--{flag}:" in texts[verb], verb


def test_shipped_configs_are_known_by_name_and_as_the_readme_writes_them_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "quickstart").mkdir()  # A workdir of that name takes nothing away.
  for name in (path.stem for path in (ROOT / "configs").glob("*.py")):
    assert config_lib.fields(config_file.load(name)) == config_lib.fields(config_file.load(f"configs/{name}.py"))
  for argument in ("deeplab_voc:trainval", "configs/deeplab_voc.py:trainval"):
    assert config_file.load(argument).data.train_split == "trainval"
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/quickstart.py").write_text("def get_config(): raise ValueError('mine')")
  with pytest.raises(ConfigError, match="mine"):  # A file that is there comes first.
    config_file.load("configs/quickstart.py")


@pytest.mark.parametrize("argument", ["quickstat", "configs/quickstat.py", "quickstat:x", "elsewhere/quickstart.py"])
def test_an_unknown_config_lists_the_shipped_ones_with_a_suggestion(argument, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError) as error:
    config_file.load(argument)
  assert str(error.value).startswith(f"{argument}: no such file.")
  assert "deeplab_voc, " in str(error.value) and "Did you mean quickstart?" in str(error.value)


def test_what_is_built_for_a_wheel_prints_a_shipped_config_as_json_from_an_empty_folder(tmp_path):
  pytest.importorskip("setuptools")
  built = run("setup.py", "-q", "build_py", f"--build-lib={tmp_path / 'built'}", cwd=ROOT)
  assert built.returncode == 0, built.stderr
  have = {path.name for path in (tmp_path / "built/segjax/configs").iterdir()}
  assert have == {path.name for path in (ROOT / "configs").glob("*.py")}
  assert (tmp_path / "built/segjax/tools/browse.html.jinja").is_file()
  (tmp_path / "empty").mkdir()
  arguments = ("config", "--config=deeplab_camvid_half", "--config.num_steps=700")
  result = run("-m", "segjax.verbs", *arguments, cwd=tmp_path / "empty", path=tmp_path / "built")
  assert result.returncode == 0, result.stderr
  printed = json.loads(result.stdout)
  assert printed["num_steps"] == 700 and printed["data"]["dir"] == "" and printed["crop_size"] == [177, 241]
  every = run("-m", "segjax.verbs", "config", "--options", cwd=tmp_path / "empty", path=tmp_path / "built")
  assert every.stdout == (ROOT / "docs/options.md").read_text()
  assert not any((tmp_path / "empty").iterdir())


def test_mode_predict_is_submit_and_says_so(tmp_path):
  arguments = ("--config=quickstart", "--workdir=run", "--num_processes=2")  # Which lacks --coordinator.
  code, out, _ = in_process.run("segjax.main", "--mode=predict", *arguments, cwd=tmp_path)
  assert code == 2 and "--mode=predict is --mode=submit now" in out, out
  assert len(out.splitlines()) == 1
