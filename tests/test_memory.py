"""What saves memory changes no update: sharded state, gradient accumulation, rematerialisation; alone and together."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import config as config_lib
from segjax import losses, models, sharding, state, steps
from segjax import train as train_lib
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.run.checkpoint import Checkpoints
from segjax.tools import hlo
from tests.experiment import host_batches, make_step, mesh_of
from tests.marks import full
from tests.test_train import assert_identical, checkpoint

ROOT = pathlib.Path(__file__).parents[1]
SLOW = pytest.mark.slow


@pytest.fixture
def config(tiny_config):
  """Wide enough that some arrays are worth splitting; odd labels and void around the crops."""
  tiny_config.model.width, tiny_config.model.depth = 16, 1
  tiny_config.augment.scale = (0.3, 1.5)
  return tiny_config


def deeplab(config):
  """The run with a DeepLabV3+ that has every kind of layer: inverted residuals, atrous branches, pooling, decoder."""
  other = config_lib.default_config(model="deeplab_v3plus", data="synthetic")
  for name in config:
    if name != "model":
      other[name] = config[name]
  other.model.update(backbone="mobilenet_v2", output_stride=8, atrous_rates=(1, 2, 3), bn_momentum=0.9)
  other.crop_size = (32, 33)
  return other


def fcn(config):
  """The run with an FCN-8s on crops that no stride divides, and every geometric augmentation on."""
  other = config_lib.default_config(model="fcn", data="synthetic")
  for name in config:
    if name != "model":
      other[name] = config[name]
  other.model.update(width=2, fuse="features")  # Whose score layers do not begin with zeros.
  other.crop_size = (40, 36)
  other.augment.update(rotation=20.0, shear=5.0, shift=0.1, zoom=0.1, elastic=1.0, hsv=(0.1, 0.1, 0.1))
  return other


def run_in_float64(config, data, space, num_steps):
  """Losses and states. SGD without momentum leaves the gradients in the parameters: states compare every gradient."""
  config.dtype = "float64"
  config.optimizer.momentum, config.optimizer.base_lr, config.optimizer.schedule = 0.0, 1.0, "constant"
  with jax.enable_x64(True):
    mesh = mesh_of(data, space)
    step, current = make_step(config, mesh)
    losses = []
    for batch in sharding.to_device(iter(host_batches(config, num_steps)), mesh):
      current, metrics = step(current, batch)
      losses.append(float(metrics["loss"]))
    result = jax.device_get(dict(losses=losses, params=current.params, stats=current.batch_stats, ema=current.ema))
  assert {leaf.dtype for leaf in jax.tree.leaves(result["params"])} == {np.dtype("float64")}
  return result


def changed(config, **fields):
  other = config.copy_and_resolve_references()
  other.update(fields)
  return other


def assert_close(result, want, tolerance=1e-9):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), result, want)


def bytes_on_first_device(tree):
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "model, data, space",
  [
    *full(("unet", 8, 1)),
    pytest.param("unet", 4, 2, marks=SLOW),
    pytest.param("deeplab", 8, 1, marks=SLOW),
    pytest.param("deeplab", 2, 4, marks=SLOW),
    pytest.param("fcn", 8, 1, marks=SLOW),
  ],
)
def test_sharded_state_trains_as_the_replicated_one_in_float64(config, model, data, space):
  config = dict(unet=lambda c: c, deeplab=deeplab, fcn=fcn)[model](config)
  want = run_in_float64(changed(config), data, space, num_steps=2)
  assert_close(run_in_float64(changed(config, shard_state=True), data, space, num_steps=2), want)


@pytest.mark.full
def test_sharded_state_splits_large_arrays_and_gathers_only_parameters(config):
  config = changed(config, shard_state=True)
  mesh = mesh_of(8)
  step, current = make_step(config, mesh)
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(current)]
  large = sum(size for size in sizes if size > 4 * sharding.WHOLE)
  assert large > sum(sizes) / 2
  assert bytes_on_first_device(current) == sum(sizes) - large + large // 8
  kernel = current.params["down1"]["conv2"]["kernel"]  # [3, 3, 32, 32]
  assert tuple(kernel.sharding.spec) == (None, None, "data")
  assert current.opt_state[-1][0].trace["down1"]["conv2"]["kernel"].sharding == kernel.sharding

  batch = next(sharding.to_device(iter(host_batches(config, 1)), mesh))
  compiled = step.lower(current, batch).compile()
  found = hlo.collectives(compiled.as_text())
  split = [leaf for leaf in jax.tree.leaves(current.params) if not leaf.sharding.is_fully_replicated]
  keys = 8 * 16  # Random numbers per example are gathered, too, some bytes each.
  moments = 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(current.batch_stats))  # Each device's, for batch norm.
  assert sum(found["all-gather"]) <= sum(leaf.nbytes for leaf in split) + keys + moments, found
  assert not found["all-to-all"] and not found["collective-permute"]
  before = jax.tree.map(lambda x: x.sharding, current)
  after, _ = compiled(current, batch)
  assert jax.tree.map(lambda x: x.sharding, after) == before


def test_the_widest_divisible_dimension_is_split():
  mesh = sharding.make_mesh(4, 2)
  shapes = dict(wide=(3, 3, 64, 256), tied=(128, 128), odd=(3, 5, 7, 999), small=(64, 64), channel=(999, 8))
  abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  specs = {name: tuple(s.spec) for name, s in sharding.of_state(mesh, abstract, True).items()}
  assert specs == dict(wide=(None, None, None, "data"), tied=("data",), odd=(), small=(), channel=(None, "data"))
  assert all(not tuple(s.spec) for s in sharding.of_state(mesh, abstract, False).values())


LAYOUTS = [  # (devices, sharded) that save and that restore
  ((8, True), (1, False)),
  ((1, False), (8, True)),
  ((8, True), (8, False)),
  ((8, False), (8, True)),
  ((8, True), (2, True)),
]


@pytest.mark.parametrize("saved, restored", [LAYOUTS[1], *full(LAYOUTS[0], *LAYOUTS[2:])])
def test_a_checkpoint_restores_under_any_number_of_devices_sharded_or_not_bit_for_bit(
  config, tmp_path, saved, restored
):
  init = Experiment(config, num_classes=6).init

  def place(devices, shard):
    mesh = sharding.make_mesh(devices, 1, devices=jax.devices()[:devices])
    return sharding.of_state(mesh, jax.eval_shape(init), shard)

  current = state.materialize(init, place(*saved))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(current)
    checkpoints.wait()
    target = place(*restored)
    again = checkpoints.restore(state.with_sharding(jax.eval_shape(init), target), 0)
  assert_identical(jax.device_get(current), jax.device_get(again))
  assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, again)) == jax.tree.leaves(target)


@pytest.mark.slow
def test_a_sharded_run_of_two_processes_goes_on_in_one_and_ends_the_same(config, tmp_path):
  """2 x 4 devices, then 1 x 8: what was saved is restored bit for bit, and the run ends as one process would end it."""
  config = changed(config, shard_state=True, dtype="float32")
  config.mesh.data, config.num_steps = -1, 6
  workdir, folder = tmp_path / "two", tmp_path / "config"
  folder.mkdir()
  config_lib.save(changed(config, num_steps=3), folder)
  environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  environ |= dict(PROCESSES="2", CPU_DEVICES="4", PYTHON=sys.executable)
  command = [ROOT / "launch" / "local.sh", f"--config={config_lib.__file__}:{folder}", f"--workdir={workdir}"]
  result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=560)
  assert result.returncode == 0, result.stdout + result.stderr
  one = tmp_path / "one"
  train_lib.train(changed(config, num_steps=3), one)
  assert_close(checkpoint(workdir, 3)["params"], checkpoint(one, 3)["params"], 1e-3)
  init = Experiment(config, num_classes=6).init
  target = sharding.of_state(sharding.make_mesh(), jax.eval_shape(init), True)
  with Checkpoints(workdir, read_only=True) as checkpoints:
    restored = checkpoints.restore(state.with_sharding(jax.eval_shape(init), target), 3)
  stored = checkpoint(workdir, 3)
  names = ("params", "batch_stats", "ema")
  assert_identical(
    {name: jax.device_get(getattr(restored, name)) for name in names}, {name: stored[name] for name in names}
  )
  opt_state = jax.tree.leaves(jax.device_get(restored.opt_state)), jax.tree.leaves(stored["opt_state"])
  jax.tree.map(np.testing.assert_array_equal, *opt_state)
  assert train_lib.train(changed(config, shard_state=False), workdir)  # On to step 6.


@pytest.mark.parametrize("parts, data", [pytest.param(2, 1, marks=SLOW), *full((4, 2)), pytest.param(2, 4, marks=SLOW)])
def test_accumulated_parts_update_as_the_whole_batch_where_nothing_mixes_examples(config, parts, data):
  """In float64, with void pixels, which the parts have different numbers of, and class weights."""
  config.model.batch_norm, config.model.dropout = False, 0.0
  want = run_in_float64(changed(config), 1, 1, num_steps=2)
  assert_close(run_in_float64(changed(config, accumulate_steps=parts), data, 1, num_steps=2), want)


@pytest.mark.parametrize("data, space", [*full((2, 1)), pytest.param(2, 2, marks=SLOW)])
def test_parts_of_the_batch_are_the_same_on_any_mesh_so_batch_norm_sees_the_same(config, data, space):
  config = changed(config, accumulate_steps=4)
  want = run_in_float64(changed(config), 1, 1, num_steps=1)
  assert_close(run_in_float64(changed(config), data, space, num_steps=1), want)
  whole = run_in_float64(changed(config, accumulate_steps=1), 1, 1, num_steps=1)
  assert abs(whole["losses"][0] - want["losses"][0]) > 1e-6  # It does see another batch.


def test_split_batch_takes_every_nth_row():
  mesh = sharding.make_mesh(4, 2)
  split = jax.jit(lambda x: sharding.split_batch(x, 2, mesh))(np.arange(16))
  np.testing.assert_array_equal(split, [np.arange(0, 16, 2), np.arange(1, 16, 2)])


@pytest.mark.full
def test_accumulation_moves_no_images_between_devices(config):
  config = changed(config, accumulate_steps=2)
  mesh = mesh_of(4)
  step, current = make_step(config, mesh)
  batch = next(sharding.to_device(iter(host_batches(config, 1)), mesh))
  found = hlo.collectives(step.lower(current, batch).compile().as_text())
  label_bytes = 16 * 24 * 4  # Of one crop.
  assert found["all-reduce"] and all(size < label_bytes for size in found["all-gather"]), found
  assert not found["all-to-all"] and not found["collective-permute"], found


def test_a_batch_that_parts_and_devices_do_not_divide_says_so():
  with pytest.raises(ConfigError, match="batch_size = 8 is not divisible by the 4 devices .* accumulate_steps = 4"):
    sharding.check_batch(sharding.make_mesh(4, 2), "batch_size", 8, parts=4)


@pytest.mark.parametrize(
  "model",
  [*full("unet"), pytest.param("deeplab", marks=SLOW), pytest.param("fcn", marks=SLOW)],
)
def test_rematerialisation_changes_neither_gradients_nor_statistics(config, model):
  config = dict(unet=lambda c: c, deeplab=deeplab, fcn=fcn)[model](config)
  want = run_in_float64(changed(config), 1, 1, num_steps=2)
  assert_close(run_in_float64(changed(config, remat=True), 1, 1, num_steps=2), want)


def residual_bytes(name, remat, size, **options):
  """What the forward pass keeps for the backward pass of two images, parameters included; nothing is compiled."""
  build = lambda: models.build(name, num_classes=19, remat=remat, rngs=nnx.Rngs(0), **options)  # noqa: E731
  graphdef, params, batch_stats = state.split(nnx.eval_shape(build))
  loss = losses.make_loss(ignore_label=255)

  def backward(params, batch_stats, image, label):
    def forward(params):
      model = steps.merge(graphdef, dict(params=params, batch_stats=batch_stats))
      value = loss(model(model.preprocess(image), train=True, key=jax.random.key(0)), label, 0)
      return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return jax.vjp(forward, params, has_aux=True)[1]

  image = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  label = jax.ShapeDtypeStruct((2, *size), jnp.int32)
  kept = jax.eval_shape(backward, params, batch_stats, image, label)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize(
  "name, options, share",
  [
    ("unet", {}, 0.5),
    ("fcn", dict(width=8), 0.6),
    *full(("deeplab_v3plus", dict(backbone="mobilenet_v2"), 0.5)),
    pytest.param("dilated_fcn", dict(backbone="resnet_50"), 0.5, marks=SLOW),
    pytest.param("deeplab_v3plus", dict(backbone="xception_65"), 0.5, marks=SLOW),
  ],
)
def test_rematerialised_blocks_keep_less_for_the_backward_pass(name, options, share):
  plain, remat = (residual_bytes(name, flag, (257, 257), **options) for flag in (False, True))
  print(f"{name} {options}: {plain / 2**20:.0f} -> {remat / 2**20:.0f} MiB for two images of 257x257")
  assert remat < share * plain


@pytest.mark.full
def test_all_options_together_in_bfloat16_train_and_resume_bit_for_bit(config, tmp_path):
  config = changed(config, dtype="bfloat16", shard_state=True, accumulate_steps=2, remat=True)
  config.mesh.data = 4
  scores = train_lib.train(config, tmp_path / "run")
  assert np.isfinite(scores["val/mean_iou"])
  end = checkpoint(tmp_path / "run", 6)
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
  train_lib.train(config, tmp_path / "run")
  again = checkpoint(tmp_path / "run", 6)
  # Without scores: on jax 0.12.0 XLA:CPU's bfloat16 evaluation differs from call to call, same program and variables.
  del end["policy"], again["policy"]
  assert_identical(end, again)
  config.num_steps = 7  # Neither option binds a run.
  train_lib.train(changed(config, shard_state=False, remat=False), tmp_path / "run")
  with pytest.raises(ConfigError, match="accumulate_steps: 2 -> 1"):
    train_lib.train(changed(config, accumulate_steps=1), tmp_path / "run")
