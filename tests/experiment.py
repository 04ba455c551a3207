"""Five steps of a small network on any mesh, in this process or in several, for the law that all are one experiment.

As a program, one of several processes: python -m tests.experiment COORDINATOR NUM_PROCESSES PROCESS_ID MODEL OUT
"""

import functools
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np

from segjax import input_pipeline, sharding
from segjax.config import default_config
from segjax.experiment import Experiment
from segjax.models.backbones import mobilenet_v2, resnet
from segjax.run import cluster, device_cache, distributed

BATCH_SIZE = 16


def make_config(model: str, dtype: str = "float64"):
  """A run on synthetic shapes with everything random on.

  Args:
    model: "unet"; "shallow_unet", of depth 1, which has each of its layers; "published_unet", unpadded and without batch norm; "fcn", on crops that no stride divides;
      "deeplab", with every kind of layer: inverted residuals, atrous branches, pooling, decoder.
  """
  names = dict(unet="unet", shallow_unet="unet", published_unet="unet", fcn="fcn", deeplab="deeplab_v3plus")
  config = default_config(model=names[model], data="synthetic")
  config.batch_size, config.crop_size, config.dtype = BATCH_SIZE, (16, 24), dtype
  config.data.update(image_size=(22, 32), num_train=20, loader="grain", workers=1)
  config.augment.update(brightness=0.2, hue=0.1)
  # SGD without momentum leaves the gradients in the parameters: where these agree, so does every gradient.
  config.optimizer.update(momentum=0.0, base_lr=0.1, schedule="constant", ema_decay=0.9)
  if model == "fcn":
    config.model.update(width=2, fuse="features")  # Whose score layers do not begin with zeros.
    config.crop_size = (40, 36)
    config.augment.update(rotation=20.0, shear=5.0, shift=0.1, zoom=0.1, elastic=1.0, hsv=(0.1, 0.1, 0.1))
    config.augment.update(class_mix=0.5, flip_vertical=True, foreground=0.5, gamma=0.2, blur=1.0, noise=0.05)
    config.data.sampling = "class_balanced"
  elif model == "deeplab":
    config.model.update(backbone="mobilenet_v2", output_stride=8, atrous_rates=(1, 2, 3), bn_momentum=0.9)
    config.crop_size = (32, 33)
    # At 0.1 this net is chaotic: 3e-15 between two meshes after one step becomes 1e-11 after three, 3e-4 after five.
    config.optimizer.base_lr = 0.001
  else:
    config.model.update(width=4, depth=2, dropout=0.3)
  if model == "shallow_unet":
    config.model.depth = 1
  elif model == "published_unet":
    config.model.update(padding="valid", batch_norm=False, depth=1)
  return config


def shorten_backbones(monkeypatch) -> None:
  """Leaves a MobileNetV2 and a ResNet-50 one or two units of each kind, since what is alike is only compiled longer."""
  residuals = ((16, 1), (24, 2), (24, 1), (32, 2), (64, 2), (64, 1), (160, 2), (320, 1))
  monkeypatch.setattr(mobilenet_v2, "RESIDUALS", residuals)
  monkeypatch.setitem(resnet.UNITS, 50, (1, 1, 1, 2))


def make_step(config, mesh, loss=None):
  """The training step under `config`, and its initial state.

  Args:
    loss: in place of the config's.
  """
  experiment = Experiment(config, mesh=mesh)
  return experiment.make_train_step(**({} if loss is None else dict(loss=loss))), experiment.init_state()


def mesh_of(data, space=1):
  """A mesh of the first devices."""
  return sharding.make_mesh(data, space, devices=jax.devices()[: data * space])


def host_batches(config, num_steps):
  """Global batches on the host."""
  source = input_pipeline.make_source(config.data, "train")
  config.data.loader = "grain"
  return list(
    input_pipeline.train_batches(
      source,
      config.data,
      seed=0,
      batch_size=config.batch_size,
      rows=np.arange(config.batch_size),
      start_step=0,
      num_steps=num_steps,
    )
  )


def label_checksum(logits, label, step, border, auxiliary):
  """A loss that tells the labels which the step made, 20 bits at any precision: a random number per pixel and value."""
  bits = jax.random.bits(jax.random.key(1), (*label.shape, 8), jnp.uint32)
  chosen = jnp.take_along_axis(bits, jnp.minimum(label, 7)[..., None], axis=-1)
  return (chosen.sum(dtype=jnp.uint32) >> 12).astype(logits.dtype)


def of_smallest_network(config):
  """The run with a U-Net of one channel, whose steps make the same labels and are compiled sooner."""
  small = default_config(model="unet", data="synthetic")
  small.update({name: config[name] for name in config if name not in ("model", "data")})
  small.data = config.data
  small.model.update(width=1, depth=1, batch_norm=False)
  if "padding" in config.model and config.model.padding == "valid":
    assert config.model.depth == 1  # On which the crop's surroundings depend.
    small.model.padding = "valid"
  return small


def run(config, mesh, num_steps: int = 5) -> dict:
  """{"ids" [steps, rows of this process], "labels" [steps] checksums, "losses" [steps], "params", "stats", "ema"}."""
  with jax.enable_x64(config.dtype == "float64"):
    source = input_pipeline.make_source(config.data, "train")
    batches = list(
      input_pipeline.train_batches(
        source,
        config.data,
        seed=0,
        batch_size=config.batch_size,
        rows=sharding.local_rows(mesh, config.batch_size),
        start_step=0,
        num_steps=num_steps,
        balance=Experiment(config, mesh=mesh).balance,
      )
    )
    found = dict(ids=np.stack([batch["id"] for batch in batches]))
    for name, made_of, loss in (("labels", of_smallest_network(config), label_checksum), ("losses", config, None)):
      step, current = make_step(made_of, mesh, loss)
      found[name] = []
      for batch in sharding.to_device(iter(batches), mesh):
        current, metrics = step(current, batch)
        found[name].append(float(metrics["loss"]))
    found |= jax.device_get(dict(params=current.params, stats=current.batch_stats, ema=current.ema))
    assert {leaf.dtype for leaf in jax.tree.leaves(found["params"])} == {np.dtype(config.dtype)}
  return found


def fetched(experiment: Experiment, num_steps: int, bad=None) -> list[dict]:
  """The batches that the train step looks up with data.cache = "device": the rows of this process, on the host."""
  mesh = experiment.mesh
  fetch = functools.partial(device_cache.fetch, mesh=mesh, canvas_size=experiment.train_canvas)
  fetch = jax.jit(sharding.on(mesh)(fetch))
  batches = map(fetch, experiment.device_batches(0, num_steps, bad))
  return [{name: rows_here(x) for name, x in batch.items()} for batch in batches]


def rows_here(x: jax.Array) -> np.ndarray:
  """The rows of a batch that this process holds."""
  parts = {shard.index[0].start or 0: np.asarray(shard.data) for shard in x.addressable_shards}
  return np.concatenate([parts[start] for start in sorted(parts)])


def assert_same_batches(want: list[dict], found: list[dict]) -> None:
  assert len(want) == len(found) > 0
  for a, b in zip(want, found):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


if __name__ == "__main__":
  coordinator, num_processes, process_id, model, out = sys.argv[1:]
  with distributed.connected(cluster.find_processes({}, coordinator, int(num_processes), int(process_id)), timeout=120):
    result = run(make_config(model), sharding.make_mesh())
    on_device = Experiment(make_config(model))
    on_device.config.data.cache = "device"
    assert_same_batches(list(on_device.train_batches(0, 3)), fetched(on_device, 3))
    with open(out, "wb") as file:
      pickle.dump(result, file)
