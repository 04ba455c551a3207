"""The benchmark of steps: its figures against what is known of the steps, and PyTorch's networks against ours."""

import importlib
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import models, sharding
from segjax.config import ConfigError, default_config
from segjax.tools import flops, step_speed, torch_process
from tests.marks import full

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def config(tiny_config):
  tiny_config.mesh.data = 1
  return tiny_config


@pytest.mark.parametrize("kind", [*full("train"), "eval"])
def test_a_row_says_what_the_step_is_and_agrees_with_itself(config, kind):
  row = step_speed.measure(config, kind, seconds=0.2)
  size = (16, 24) if kind == "train" else (24, 32)  # The crop; the canvas of the data.
  model = models.build("unet", num_classes=6, width=4, depth=2, rngs=nnx.Rngs(0))
  count = flops.multiply_adds(model, jnp.zeros((8, *size, 3)))
  assert (row["size"], row["batch_size"], row["multiply_adds"]) == (list(size), 8, count)
  assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] and row["compile_s"] > 0
  assert row["images_per_s"] == pytest.approx(8e3 / row["median_ms"])
  assert row["tflops"] == pytest.approx(2 * count * (3 if kind == "train" else 1) / row["median_ms"] / 1e9)
  assert 0 < row["share_of_peak"] < 1 and 0 <= row["data_wait_share"] < 1
  assert row["memory_bytes"] > 8 * 16 * 24 * 4 * 4  # The first layer's result.
  header, rule, line = step_speed.table([row]).splitlines()
  assert header.count("|") == rule.count("|") == line.count("|") and f"unet {kind} float32 | 8x{size[0]}" in line


@pytest.mark.full
def test_without_its_data_a_config_is_measured_on_noise():
  config = default_config(model="unet", data="voc")
  config.data.dir, config.mesh.data, config.crop_size, config.batch_size = "absent", 1, (16, 16), 2
  config.model.width, config.model.depth = 2, 1
  program = step_speed.of_train(config, sharding.make_mesh(1, 1))
  program.run()
  assert program.wait_share is None and program.size == (16, 16)


@pytest.mark.full
def test_a_train_step_that_is_measured_learns(config):
  """It is the run's own step, on a state that goes on."""
  program = step_speed.of_train(config, sharding.make_mesh(1, 1))
  for _ in range(3):
    program.run()
  assert program.forward > 0


@pytest.mark.full
def test_compilation_is_measured_anew_and_from_the_cache_and_nothing_is_run(config):
  rows = [step_speed.measure_compilation(config, kind) for kind in ("train", "eval")]
  assert all(0 < row["from_cache_s"] < row["compile_s"] for row in rows), rows
  assert rows[0]["multiply_adds"] > 2 * rows[1]["multiply_adds"] * (16 * 24) / (24 * 32)
  assert rows[0]["temporary_bytes"] > rows[1]["temporary_bytes"] and rows[0]["collective_bytes"] == 0
  header, rule, *lines = step_speed.compilation_table(rows).splitlines()
  assert {line.count("|") for line in (header, rule, *lines)} == {8} and "| unet eval float32 |" in lines[1]


def test_what_pytorch_cannot_follow_is_refused():
  config = default_config(model="unet", data="synthetic")
  config.model.padding = "valid"
  with pytest.raises(ConfigError, match="segjax's defaults in model.padding"):
    torch_process.check_options(config)
  with pytest.raises(ConfigError, match="knows unet, fcn, deeplab_v3plus, not dilated_fcn"):
    torch_process.check_options(default_config(model="dilated_fcn", data="synthetic"))


NETWORKS = [
  ("unet", {}),
  ("unet", dict(width=16)),
  ("fcn", {}),
  ("fcn", dict(stride=16, width=16)),
  ("fcn", dict(stride=32)),
  *(("deeplab_v3plus", dict(backbone=f"xception_{depth}")) for depth in (41, 65, 71)),
  *(("deeplab_v3plus", dict(backbone=name)) for name in ("mobilenet_v2", "resnet_50", "resnet_101")),
  ("deeplab_v3plus", dict(output_stride=8)),
]
DEEPER = NETWORKS[6:8] + NETWORKS[10:]  # More units of those before them.


@pytest.mark.parametrize("name, options", [case for case in NETWORKS if case not in DEEPER] + full(*DEEPER))
def test_pytorchs_network_has_as_many_parameters_and_multiply_adds(name, options, monkeypatch):
  torch = pytest.importorskip("torch", reason="PyTorch is for comparing speed only")
  counter = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  networks = importlib.import_module("torch_networks")
  assert networks.NETWORKS[name][1] == torch_process.OPTIONS[name]
  size = 257 if name == "deeplab_v3plus" else 256
  model = nnx.eval_shape(lambda: models.build(name, num_classes=21, rngs=nnx.Rngs(0), **options))
  graphdef, variables = nnx.split(model)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  count = flops.multiply_adds(lambda variables, image: nnx.merge(graphdef, variables)(image), variables, image)
  with torch.device("meta"):
    theirs = networks.NETWORKS[name][0](21, **options).eval()
    with counter:
      assert theirs(torch.zeros(1, 3, size, size)).shape == (1, 21, size, size)
  assert sum(p.numel() for p in theirs.parameters()) == parameters
  # Our transposed convolutions count their border of zeros.
  assert counter.get_total_flops() / 2 == pytest.approx(count, rel=1e-2 if name == "fcn" else 1e-9)


@pytest.mark.full
def test_pytorch_answers_in_turn(config, monkeypatch):
  pytest.importorskip("torch", reason="PyTorch is for comparing speed only")
  config.model.dropout = 0.0
  row = step_speed.measure(config, "train", seconds=0.2, torch_forms=("nchw", "channels_last"))
  assert row["torch_form"] in row["torch_trials_ms"] and set(row["torch_trials_ms"]) == {"nchw", "channels_last"}
  assert row["ratio"] == pytest.approx(row["torch_ms"] / row["median_ms"])


@pytest.mark.parametrize(
  "python, fault", [("/absent/python", "cannot be run: No such file"), ("false", "has no PyTorch")]
)
def test_a_python_without_pytorch_is_named(config, python, fault):
  with pytest.raises(ConfigError, match=f"{python}.*{fault}"):
    torch_process.Torch(config, "train", 1, (64, 64), 2, python)


def test_a_python_with_pytorch_and_without_segjax_is_told_so(config, tmp_path):
  python = tmp_path / "python"
  python.write_text('#!/bin/sh\ntest "$2" = "import torch"\n')
  python.chmod(0o755)
  with pytest.raises(ConfigError, match="has PyTorch but cannot import segjax.*pip install -e ."):
    torch_process.Torch(config, "train", 1, (64, 64), 2, str(python))


@pytest.mark.full
def test_the_command_appends_json_lines(tmp_path):
  command = [
    sys.executable,
    "-m",
    "segjax.benchmark",
    "--config=configs/quickstart.py",
    "--what=eval",
    "--seconds=0.1",
    "--config.model.width=2",
    "--config.eval.batch_size=2",
    "--config.mesh.data=1",
    f"--json={tmp_path / 'rows'}",
  ]
  result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
  assert result.returncode == 0 and "| unet eval float32 | 2x64x64 |" in result.stdout, result.stderr
  (line,) = (tmp_path / "rows").read_text().splitlines()
  row = json.loads(line)
  assert row["what"] == "eval" and np.isfinite(row["median_ms"]) and row["jax"] == jax.__version__
  result = subprocess.run([*command, "--what=trian"], capture_output=True, text=True, check=False, cwd=ROOT)
  assert result.returncode != 0 and "choose from train, eval, compile, input" in result.stdout + result.stderr
