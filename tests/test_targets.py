"""Devices that need not be there: how they are named, and what is said where they cannot be described."""

import json
import types

import jax
import pytest
from jax.experimental import topologies

from segjax.config import ConfigError
from segjax.tools import programs, roofline, targets
from segjax.tools.dry_run import device_memory, dry_run
from tests.experiment import mesh_of


@pytest.mark.parametrize("target", ["h100", "gpu", "gpu:v5e", "tpu:h100:1", "gpu:h100:many", "tpu:v5e:2x", "cpu", ""])
def test_another_name_is_refused_with_all_there_are(target):
  with pytest.raises(ConfigError, match=f"--target={target}: no such target. Choose here or one of gpu:a100, gpu:h100"):
    targets.devices(target)


@pytest.mark.parametrize(
  "target, error, message",
  [
    ("gpu:h100", NotImplementedError("topology"), rf"not installed: pip install 'jax\[cuda12\]=={jax.__version__}'"),
    (
      "gpu:h100:3",
      jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no"),
      "plugin cannot describe it .*INVALID_ARGUMENT: no",
    ),
    (
      "tpu:v5e:2x4",
      RuntimeError("JAX TPU support not installed"),
      r"not installed: pip install --no-deps 'libtpu==0.0.\d+",
    ),
    (
      "tpu:v5e:2x4",
      RuntimeError("ABORTED: The TPU is already in use by process with pid 7."),
      "one process at a time.*pid 7",
    ),
    ("tpu:v5e:3x5", RuntimeError("INVALID_ARGUMENT: no such topology"), "INVALID_ARGUMENT: no such topology"),
  ],
)
def test_a_missing_plugin_is_named_with_the_command_that_installs_it(target, error, message, monkeypatch):
  def fail(**description):
    raise error

  monkeypatch.setattr(topologies, "get_topology_desc", fail)
  with pytest.raises(ConfigError, match=f"--target={target}: .*{message}"):
    targets.devices(target)


def test_a_description_is_of_the_device_asked_for(monkeypatch):
  def describe(platform, topology_name="", topology="", target_config=""):
    return types.SimpleNamespace(devices=[platform, topology_name or topology, target_config])

  monkeypatch.setattr(topologies, "get_topology_desc", describe)
  platform, topology, text = targets.devices("gpu:a100:4x8")
  assert (platform, topology) == ("cuda", "1x4x8") and "core_count: 108" in text and "NVIDIA A100-SXM4-80GB" in text
  assert targets.devices("gpu:h200")[1] == "1x1x1" and targets.devices("tpu:v6e:16x16")[:2] == ["tpu", "v6e:16x16"]


def test_gpus_that_are_not_there_are_compiled_for_without_trying_and_have_what_jax_takes_of_them():
  device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
  mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device]))
  assert targets.compiler_options(mesh)["xla_gpu_autotune_level"] == 0
  assert targets.compiler_options(mesh_of(1)) == {} and targets.is_here(mesh_of(1)) and not targets.is_here(mesh)
  size, meaning = device_memory(device)
  assert size == 84_942_979_072 * 3 // 4 and "XLA_PYTHON_CLIENT_MEM_FRACTION" in meaning
  assert targets.facts(jax.devices()[0]) is None


def test_a_step_is_set_against_the_data_sheet(monkeypatch):
  """128 images of a product of 512x512 matrices of bfloat16, written once: bound by the matrix units of an H100."""
  product = jax.jit(lambda x: jax.lax.dot(x, x, precision="highest"))
  program = programs.compile_step(product, jax.ShapeDtypeStruct((512, 512), "float32"))
  device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
  row, known = roofline.row(program, device), targets.ACCELERATORS["gpu:h100"]
  (flops,) = row["flops"].values()
  assert flops == 2 * 512**3 and row["hbm_bytes"] >= 2 * 2**20
  assert row["hbm_seconds"] == pytest.approx(row["hbm_bytes"] / known.bandwidth)
  assert row["matrix_seconds"] in [pytest.approx(flops / known.flops[numbers]) for numbers in ("f32", "f32 highest")]
  assert row["binds"] == ("memory" if row["hbm_seconds"] > row["matrix_seconds"] else "matrix units")
  assert sum(place["share"] for place in row["places"]) == pytest.approx(1)
  assert f"bound by {row['binds']}; NVIDIA H100 datasheet" in roofline.table(program, device)
  assert roofline.rate(program, 7, known) == pytest.approx(7 / max(row["hbm_seconds"], row["matrix_seconds"]))


def test_a_host_that_could_starve_the_devices_is_warned_of_only_where_both_speeds_are_known():
  assert "core" not in roofline.input_lines(1000.0, None, 2)
  assert "1,000.0 images/s on all devices (estimate); at 30.0 images/s per core, 34 cores" in roofline.input_lines(
    1000.0, 30.0, None
  )
  assert "WARNING: 33 cores read at most 990.0 images/s" in roofline.input_lines(1000.0, 30.0, 33)
  for cores in (34, None):
    assert "WARNING" not in roofline.input_lines(1000.0, 30.0, cores)


def test_a_dry_run_for_a_target_tells_costs_and_appends_them_as_json(tiny_config, tmp_path, capsys, monkeypatch):
  program = programs.compile_step(jax.jit(lambda x: x @ x), jax.ShapeDtypeStruct((64, 64), "float32"))
  for name in ("compile_train", "compile_eval"):
    monkeypatch.setattr(programs, name, lambda *arguments: program)
  dry_run(tiny_config)
  assert "costliest places" not in capsys.readouterr().out
  dry_run(tiny_config, target="here", figures=str(tmp_path / "rows.jsonl"))
  output = capsys.readouterr().out
  assert "costliest places" in output and output.count("not compared: what this device can do is not known") == 2
  train, evaluation = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
  assert (train["step"], evaluation["step"], train["target"]) == ("train", "evaluation", "here")
  assert train["flops"] == evaluation["flops"] and sum(train["flops"].values()) == 2 * 64**3
  assert "hbm_seconds" not in train and train["places"]  # Nothing is known of a CPU.
  monkeypatch.setattr(targets, "facts", lambda device: targets.ACCELERATORS["gpu:h100"])
  tiny_config.data.workers = 1
  rate = roofline.rate(program, 8, targets.ACCELERATORS["gpu:h100"])
  dry_run(tiny_config, target="here", loader_speed=0.9 * rate)
  assert capsys.readouterr().out.count("WARNING: 1 cores read at most") == 2
  tiny_config.data.cache = "device"
  dry_run(tiny_config, target="here", loader_speed=0.9 * rate)
  output = capsys.readouterr().out
  assert output.count("WARNING: 1 cores read at most") == 1 and "data.cache = device): the host sends ids" in output
