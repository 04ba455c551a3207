"""The house's layers: a file imports only downwards, and data workers never import JAX."""

import ast
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from segjax import input_pipeline
from segjax.config import SOURCES, ConfigError, default_config, fields
from segjax.config.options import networks
from segjax.train import train
from tests.marks import SUITES

PACKAGE = pathlib.Path(__file__).parents[1] / "segjax"

# From the foundation up: folders, and files at the top. Each imports from itself and from those before it.
LAYERS = (
  ("config", "files"),
  ("losses", "optimizer", "sharding"),
  ("kernels",),
  ("models",),
  ("augment", "inference", "metrics"),
  ("pretrained", "input_pipeline", "state", "steps"),
  ("run",),
  ("experiment",),
  ("evaluate", "train", "predict"),
  ("tools",),
  ("main",),
)


def imports_of(path):
  """Modules of segjax that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "segjax":
      base = node.module.removeprefix("segjax").lstrip(".")
      for alias in node.names:
        whole = f"{base}.{alias.name}".lstrip(".")
        is_module = (PACKAGE / f"{whole.replace('.', '/')}.py").exists() or (PACKAGE / whole.replace(".", "/")).is_dir()
        found.add(whole if is_module else base)
  return found - {""}


def test_every_file_has_a_layer_and_imports_only_downwards():
  level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
  for path in PACKAGE.rglob("*.py"):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
      continue
    assert own in level, f"{path} is in no layer of the house"
    for other in imports_of(path):
      other = other.split(".")[0]
      assert level[other] <= level[own], f"{path.relative_to(PACKAGE)} imports {other}, which is not below it"


def layers_in(lines):
  """The names between backticks in each line."""
  return [set(re.findall(r"`(\w+)/?`", line)) for line in lines]


def test_the_maps_in_the_documents_are_the_layers():
  root = PACKAGE.parent
  rows = re.findall(r"(?m)^\| (`.*?) \|", (root / "docs/architecture.md").read_text())
  assert layers_in(rows) == [set(layer) for layer in reversed(LAYERS)]
  steps = re.search(r"(?s)\n`config/`.*?\n\n", (root / "CONTRIBUTING.md").read_text())[0].split("→")
  assert layers_in([step.replace("(`backbones/`)", "") for step in steps]) == [set(layer) for layer in LAYERS]


def binds(path, name):
  """Whether a module has a function, class, variable, attribute or field of that name, or an `__init__.py` takes it in."""
  pattern = rf"(?m)^\s*(?:def|class) {name}\b|^\s*{name}(?:, \w+)*(?:: [^=\n]+)? =|\bself\.{name}\b|^ +{name}: "
  if path.stem == "__init__":
    pattern += rf"|^from .*\b{name}\b"
  return bool(re.search(pattern, path.read_text())) or (path.parent / f"{name}.py").exists()


def test_comments_and_documents_name_only_what_there_is():
  """Files by their path, and `module.name` in backticks; but for fields of `config`."""
  root, modules, missing = PACKAGE.parent, {}, []
  known_fields = {field for source in SOURCES for field in fields(default_config("unet", source))}
  for path in PACKAGE.rglob("*.py"):
    modules.setdefault(path.parent.name if path.stem == "__init__" else path.stem, []).append(path)
  files = r"\b(?:segjax|tests|benchmarks|models|kernels|run|tools|docs)/(?:\w+/)*[a-z_0-9]+\.(?:py|md)\b"
  for path in [*PACKAGE.rglob("*.py"), *root.glob("benchmarks/*.*"), *root.glob("docs/*.md"), *root.glob("*.md")]:
    text = path.read_text()
    missing += [
      (path.name, n) for n in re.findall(files, text) if not (root / n).exists() and not (PACKAGE / n).exists()
    ]
    for module, name in re.findall(r"`(?!jax\.)(?:\w+\.)*([a-z_]+)\.([A-Za-z]\w*)[`(]", text):
      known = f"{module}.{name}" in known_fields or name in ("py", "json", "jsonl", "tgz", "html", "benchmark")
      if module in modules and module != "config" and not known:
        missing += [(path.name, f"{module}.{name}")] * (not any(binds(file, name) for file in modules[module]))
  assert missing == []


def test_the_story_is_at_the_top_and_nothing_else():
  assert len(list(PACKAGE.glob("*.py"))) <= 15


def test_files_stay_below_400_lines_and_constructors_at_10_arguments():
  """But for the constructors of models, whose arguments are their papers' variants."""
  for path in PACKAGE.rglob("*.py"):
    text = path.read_text()
    assert text.count("\n") < 400, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef) and node.name == "__init__" and "models" not in path.parts:
        assert len(node.args.args[1:] + node.args.kwonlyargs) <= 10, (path, node.lineno)


def has_default_tests(path):
  """Whether a test of the file is of no other suite; one of whose cases are is."""
  of_suite = re.compile(rf"pytest\.mark\.({'|'.join(SUITES)})$")
  body = ast.parse(path.read_text()).body
  if any(isinstance(node, ast.Assign) and of_suite.match(ast.unparse(node.value)) for node in body):
    return False
  tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
  return any(not any(of_suite.match(ast.unparse(mark)) for mark in test.decorator_list) for test in tests)


def names_in(path):
  """Modules of segjax that a file imports or names, to import or build it later or to run it; commands as people call them."""
  strings = {str(node.value) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
  named = {text.removeprefix("segjax.") for text in strings if re.fullmatch(r"segjax\.[\w.]+", text)}
  named |= {networks()[name].rpartition(".")[0] for name in strings & networks().keys()}
  found = imports_of(path) | named | {f"tools.{name}" for name in named}
  return found | {name.rpartition(".")[0] for name in found}


def test_every_module_is_imported_by_the_default_tests():
  """By their files, or by what these import."""
  files = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")
  }
  files = {name.removesuffix(".__init__"): path for name, path in files.items()}
  tests = [path for path in pathlib.Path(__file__).parent.glob("test_*.py") if has_default_tests(path)]
  reached, new = {"__init__"}, set().union(*map(names_in, tests))
  while new := {name for name in new if name in files} - reached:
    reached |= new
    new = set().union(*(names_in(files[name]) for name in new))
  assert sorted(files.keys() - reached) == []


def test_only_the_doors_import_a_story():
  """Whoever needs a part of one finds it below them."""
  stories = {"train", "evaluate", "predict"}
  found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if stories & imports_of(path)}
  assert found <= {"main.py", "tools/verbs.py"}, found


def test_the_story_of_training_has_at_most_100_lines():
  tree = ast.parse((PACKAGE / "train.py").read_text())
  (story,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
  assert story.end_lineno - story.lineno < 100


def run(code):
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_sources_and_order_import_no_jax():
  code = """
import sys
sys.modules["jax"] = None  # Any import of it now raises.
from segjax import input_pipeline
from segjax.input_pipeline.sources.synthetic import SyntheticSource
source = SyntheticSource(split="train", num_train=3, num_val=1, image_size=(8, 8))
assert input_pipeline.load_example(source, (9, 9), 1)["image"].shape == (8, 8, 3)
assert not any(name.split(".")[0] in ("flax", "orbax", "tensorflow") for name in sys.modules)
"""
  assert run(code).returncode == 0, run(code).stderr


def test_a_run_with_grain_imports_no_tensorflow(tmp_path):
  code = f"""
import pathlib
import sys
for name in ("tensorflow", "tensorflow_datasets"):
  sys.modules[name] = None  # Any import of it now raises.
from segjax.config import default_config
from segjax.train import train
from segjax.evaluate import evaluate
from segjax.tools import browse
config = default_config(data="synthetic")
config.num_steps, config.batch_size, config.crop_size, config.data.loader = 2, 8, (8, 8), "grain"
config.data.image_size, config.data.num_train, config.data.num_val = (8, 8), 4, 2
config.model.width, config.model.depth = 2, 1
train(config, {str(tmp_path / "run")!r})
evaluate(config, {str(tmp_path / "run")!r})
browse.browse(config, pathlib.Path({str(tmp_path / "browse.html")!r}), 2)
"""
  result = run(code)
  assert result.returncode == 0, result.stderr
  assert (tmp_path / "browse.html").exists()
  assert (tmp_path / "run" / "metrics.jsonl").exists() and list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_tensorboard_reads_curves_and_pictures_that_were_written_without_tensorflow(tmp_path):
  """Also where it is installed, which TensorBoard's own Writer would import."""
  code = f"""
import sys
import numpy as np
from segjax.run import report, trackers
picture = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
for start, later in ((0, (2, 4)), (4, (6,))):  # A run and its resumption, in a file each.
  writer = report.Writer(
    {str(tmp_path)!r}, start_step=start, trackers=trackers.Trackers(("tensorboard",), {{}}, {str(tmp_path)!r}, print)
  )
  for step in later:
    writer.scalars(step, {{"train/loss": step / 4, "val/iou/Void & co": float("nan")}})
  writer.pictures(later[-1], {{"a/b": picture}})
assert "tensorflow" not in sys.modules
sys.modules["tensorflow"] = None
import io
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator({str(tmp_path)!r}).Reload()
assert events.Tags()["scalars"] == ["train/loss"] and events.Tags()["images"] == ["overlays/a/b"]
assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(2, 0.5), (4, 1), (6, 1.5)]
images = events.Images("overlays/a/b")
assert [(e.step, e.width, e.height) for e in images] == [(4, 3, 2), (6, 3, 2)]
assert (np.asarray(Image.open(io.BytesIO(images[1].encoded_image_string))) == picture).all()
"""
  result = run(code)
  assert result.returncode == 0, result.stderr
  assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


@pytest.mark.full
def test_a_run_of_tf_data_goes_on_with_grain_where_tensorflow_is_not_installed(tmp_path):
  """Begun with it in this process; gone on with, and warm-started from PyTorch-style weights, where nothing finds it."""
  code = f"""
import sys
for name in ("tensorflow", "tensorflow_datasets", "clu"):
  sys.modules[name] = None  # Any import of it now raises, and find_spec finds nothing.
from segjax import config as config_lib
from segjax.evaluate import evaluate
from segjax.pretrained import files
from segjax.train import train
config = config_lib.load({str(tmp_path / "run")!r})
assert config.data.loader == "tf_data"
config.num_steps = 3
train(config, {str(tmp_path / "run")!r})
evaluate(config, {str(tmp_path / "run")!r})
print(sorted(files.load_arrays({str(tmp_path / "w.safetensors")!r})))
"""
  config = default_config(data="synthetic")
  config.num_steps, config.batch_size, config.crop_size = 2, 8, (8, 8)
  config.data.image_size, config.data.num_train, config.data.num_val = (8, 8), 4, 2
  config.model.width, config.model.depth = 2, 1
  train(config, tmp_path / "run")
  assert len(list((tmp_path / "run").glob("events*"))) == 1
  safetensors.numpy.save_file({"conv.weight": np.zeros((1, 1), np.float32)}, tmp_path / "w.safetensors")
  result = run(code)
  assert result.returncode == 0, result.stderr
  assert "loader grain, because TensorFlow is not installed" in result.stdout and "['conv.weight']" in result.stdout
  assert "at step 2" in result.stdout and len(list((tmp_path / "run").glob("events*"))) == 2


def test_a_broken_tensorflow_is_an_error_with_the_way_around_it(monkeypatch):
  data = default_config(data="synthetic").data
  source = input_pipeline.make_source(data, "val")
  monkeypatch.setattr(input_pipeline, "_LOADERS", {"tf_data": "segjax.no_such_module"})
  with pytest.raises(ConfigError, match="The loader tf_data cannot be imported .*--config.data.loader=grain"):
    next(input_pipeline.eval_batches(source, data, batch_size=1, rows=[0]))
