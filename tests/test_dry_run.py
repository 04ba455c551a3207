"""What a dry run says, against the arrays of the real run; and that it needs neither data nor workdir."""

import dataclasses
import importlib
import pathlib

import jax
import pytest

from segjax import config as config_lib
from segjax import input_pipeline, metrics, sharding, steps
from segjax.config import ConfigError
from segjax.tools import flops
from segjax.tools.dry_run import device_memory, dry_run
from segjax.tools.programs import compile_step
from tests import command
from tests.experiment import host_batches, make_step, mesh_of
from tests.test_config import CONFIGS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def config(tiny_config):
  tiny_config.model.width, tiny_config.model.depth = 16, 1
  return tiny_config


def test_dry_run_tells_what_the_real_step_holds_and_writes_nothing(config, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config.mesh.data, config.shard_state, config.eval.batch_size = 8, True, 16
  programs = dry_run(config, tmp_path / "run")
  assert list(tmp_path.iterdir()) == []
  mesh = mesh_of(8)
  _, current = make_step(config, mesh)
  batch = next(sharding.to_device(iter(host_batches(config, 1)), mesh))
  del batch["id"]  # The step does not read it.
  held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((current, batch)))
  assert programs["train"].arguments == pytest.approx(held, rel=0.01)  # Buffers are aligned.
  assert programs["train"].outputs < 10_000  # The state takes the place of the old one.
  assert programs["train"].temporary > 16 * 24 * 16 * 4  # Some layer of the only crop that a device has.
  found = programs["train"].collectives
  assert found["all-reduce"] and found["all-gather"]
  prediction, counts = 2 * 24 * 32, 2 * metrics.BINS * metrics.FINE_BINS * 4
  assert prediction <= programs["evaluation"].outputs < 2 * prediction + counts
  output = capsys.readouterr().out
  count = sum(leaf.size for leaf in jax.tree.leaves(current.params))
  for text in (
    f"{count:,}",
    "20 images in 'train' of synthetic",
    "6 classes, canvas 24x32",
    "shard_state=True",
    f"{len(found['all-reduce'])} all-reduce",
    "host memory, which 8 devices share): fits",
  ):
    assert text in output, output


def test_a_run_too_large_for_its_devices_is_told_so_with_remedies(config, capsys, monkeypatch):
  monkeypatch.setattr("segjax.tools.dry_run.device_memory", lambda device: (10_000, "memory"))
  program = dataclasses.replace(compile_step(jax.jit(lambda x: x + 1), 1.0), temporary=20_000)
  for name in ("compile_train", "compile_eval"):
    monkeypatch.setattr(f"segjax.tools.programs.{name}", lambda *arguments: program)
  dry_run(config)
  assert "DOES NOT FIT. Set remat=True, a larger accumulate_steps" in capsys.readouterr().out
  monkeypatch.undo()
  size, meaning = device_memory(jax.devices()[0])
  assert size > 2**20 and meaning == "host memory, which 8 devices share"


def test_what_waits_on_the_devices_is_counted(config, capsys, monkeypatch):
  config.eval.batch_size, config.data.image_size = 16, (240, 320)
  program = dataclasses.replace(compile_step(jax.jit(lambda x: x + 1), 1.0), arguments=0, outputs=1000, temporary=2**30)
  for name in ("compile_train", "compile_eval"):
    monkeypatch.setattr(f"segjax.tools.programs.{name}", lambda *arguments: program)
  dry_run(config)
  needed = float(capsys.readouterr().out.split("needs at most ")[1].split(" MiB")[0].replace(",", ""))
  image = 240 * 320 * 4 + 12  # Image, label, size and id.
  _, current = make_step(config, mesh_of(1))
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves((current.params, current.opt_state, current.batch_stats)))
  # While evaluating: three batches of it beside the step's own, three of training, two results, the state but for averages.
  assert needed == pytest.approx((program.peak + 1000 + 3 * 16 * image + 3 * 8 * image + kept) / 2**20, abs=0.1)


def test_multiply_adds_count_every_part_and_what_is_computed_again(config):
  def count(**fields):
    other = config.copy_and_resolve_references()
    other.update(fields)
    mesh = mesh_of(1)
    step, current = make_step(other, mesh)
    return flops.multiply_adds(step, current, steps.abstract_batch(mesh, 8, (24, 32)))

  whole, parts, remat = count(), count(accumulate_steps=4), count(remat=True)
  assert whole == parts and 1.1 * whole < remat < 1.5 * whole


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_can_be_dry_run_without_data_or_says_what_is_missing(name):
  config = config_lib.finalize(importlib.import_module(f"configs.{name}").get_config())
  config.data.dir = "/nowhere"
  if config.data.name in ("synthetic", "voc", "cityscapes", "kitti_road"):
    num_classes, canvas, _ = input_pipeline.classes_and_canvas(config.data, config.data.train_split)
    assert num_classes == dict(synthetic=6, voc=21, cityscapes=19, kitti_road=2)[config.data.name] and min(canvas) >= 64
    return
  missing = [field for field in ("classes", "canvas_size") if not any(config.data[field])]
  if missing:
    names = " and ".join(f"data.{field}" for field in missing)
    with pytest.raises(ConfigError, match=f"/nowhere(.|\n)*Without the data set, {names} must be set"):
      input_pipeline.classes_and_canvas(config.data, config.data.train_split)
  config.data.classes = config.data.classes or ("ground", "cell")
  config.data.canvas_size = (360, 480)
  assert input_pipeline.classes_and_canvas(config.data, "train")[:2] == (len(config.data.classes), (360, 480))


def test_every_other_mode_wants_a_workdir():
  code, _, err = command.run("segjax.main", "--config=configs/quickstart.py", "--mode=eval", cwd=ROOT)
  assert code == 2 and "only --mode=dry_run needs none" in err, err


def test_an_evaluation_on_several_canvases_needs_what_the_greediest_of_them_does(tiny_config, monkeypatch, capsys):
  """The largest takes one image to a device; a whole batch on it would be told to need far more."""
  program = compile_step(jax.jit(lambda x: x + 1), 1.0)
  monkeypatch.setattr("segjax.tools.programs.compile_train", lambda *arguments: program)  # Which is not the question.
  monkeypatch.setattr(input_pipeline, "eval_canvases", lambda source, data: [(24, 32), (48, 64)])
  several = dry_run(tiny_config)["evaluation"].peak
  assert "evaluation has 2 canvases" in capsys.readouterr().out
  monkeypatch.setattr(input_pipeline, "eval_canvases", lambda source, data: [(48, 64)])
  assert several < dry_run(tiny_config)["evaluation"].peak
