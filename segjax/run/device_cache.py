"""The training split in the devices' memory (data.cache = "device"): the step gathers its batch, and the host sends ids alone.

Examples are split over all devices, whole images on one each, so that all of their memory together counts. Every device
looks up those of a batch that it holds, and a reduce-scatter brings each to the device that trains on it.
"""

import concurrent.futures
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from segjax import input_pipeline, sharding, steps
from segjax.config import ConfigError
from segjax.input_pipeline import canvas, order
from segjax.input_pipeline.images import DataError
from segjax.run.report import say
from segjax.state import with_sharding

_AXES = ("data", "space")


def abstract_split(mesh: Mesh, source, canvas_size: tuple[int, int], border: bool) -> dict:
  """The shapes of what `load` gives: the examples of `source` and at least one without pixels, the last, for `order.PADDING`."""
  rows = -(-(len(source) + 1) // mesh.size) * mesh.size
  arrays = steps.abstract_batch(mesh, rows, canvas_size, source.pixels, border)
  del arrays["id"]
  return with_sharding(arrays, NamedSharding(mesh, PartitionSpec(_AXES)))


def load(source, abstract: dict, *, workers: int, beside: int) -> tuple[dict, dict]:
  """Reads a split into the memory of the devices, each process what its own hold.

  Args:
    source: a `sources.base.Source`.
    abstract: of `abstract_split`.
    workers: threads; 0 for one per core.
    beside: bytes that each device must have left for other things.

  Returns:
    {name: array [examples, ...]} of `image`, `label`, `size` and `border`, as in host batches, on canvases.
    {id: DataError} of the examples that this process could not read, which are without pixels.

  Raises:
    ConfigError: it does not fit.
  """
  canvas_size, size, border = abstract["label"].shape[1:], sharding.bytes_per_device(abstract), "border" in abstract
  check_room(size + beside, size, abstract["size"].sharding.mesh)
  say(f"data.cache = device: reading {len(source)} training examples, {size / 2**20:,.1f} MiB on each device ...")
  parts, unreadable = {name: [] for name in abstract}, {}

  def read(index: int) -> dict:
    try:
      return input_pipeline.load_example(source, canvas_size, index, border)
    except DataError as error:
      unreadable[index] = error
      return input_pipeline.load_example(source, canvas_size, order.PADDING, border)

  def fill(arrays, row, index):
    for name, value in canvas.pad_batch([read(index)], canvas_size).items():
      if name in arrays:
        arrays[name][row] = value[0]

  rows = abstract["size"].shape[:1]
  with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count(), "device_cache") as pool:
    for device, (held,) in abstract["size"].sharding.addressable_devices_indices_map(rows).items():
      ids = np.arange(rows[0])[held]
      ids[ids >= len(source)] = order.PADDING
      arrays = {name: np.empty((len(ids), *x.shape[1:]), x.dtype) for name, x in abstract.items()}
      list(pool.map(lambda row, index, arrays=arrays: fill(arrays, row, int(index)), range(len(ids)), ids))
      for name, value in arrays.items():
        parts[name].append(jax.device_put(value, device))
  arrays = {
    name: jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts[name]) for name, x in abstract.items()
  }
  return arrays, unreadable


def fetch(batch: dict, mesh: Mesh, canvas_size: tuple[int, int]) -> dict:
  """Inside a jitted step: ids to the batch that a loader would have given, bit for bit.

  Args:
    batch: `id` [B] int32, `order.PADDING` where all is void, `split` from `load`, and what else is in
      `input_pipeline.id_batches`.
    canvas_size: (H, W) to which images are cut where there is an `origin`.
  """
  split, rest = batch["split"], {name: value for name, value in batch.items() if name != "split"}
  count = split["size"].shape[0]
  origin = rest["origin"] if "origin" in rest else None

  def look_up(split, ids, origin):
    held = count // mesh.size
    row = jnp.where(ids == order.PADDING, count - 1, ids) - held * jax.lax.axis_index(_AXES)
    here = (row >= 0) & (row < held)

    def of_batch(name, x):
      x = x[jnp.clip(row, 0, held - 1)]
      if origin is not None and name in canvas.FILL:
        cut = (*canvas_size, *x.shape[3:])
        x = jax.vmap(lambda x, first: jax.lax.dynamic_slice(x, (*first, *(0,) * (x.ndim - 2)), cut))(x, origin)
      x, restore = _summable(x)
      x = jnp.where(here.reshape(-1, *(1,) * (x.ndim - 1)), x, jnp.zeros((), x.dtype))  # One device has it.
      return restore(jax.lax.psum(jax.lax.psum_scatter(x, "data", tiled=True), "space"))

    return {name: of_batch(name, x) for name, x in split.items()}

  # By shard_map, as XLA left alone may gather the whole split on each device.
  look_up = jax.shard_map(
    look_up,
    in_specs=(PartitionSpec(_AXES), PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec("data"),
    check_vma=False,
  )
  # The barrier keeps the look-up out of the augmentation's fusions, which so round as they do without it.
  return jax.lax.optimization_barrier(rest | look_up(split, rest["id"], origin))


def _summable(x: jax.Array):
  """Pixels in a type whose sums with zeros keep every bit on every platform, and what brings that back."""
  if x.dtype == jnp.uint16:  # NCCL sums none.
    return x.astype(jnp.int32), lambda x: x.astype(jnp.uint16)
  if x.dtype == jnp.float32:  # -0 + 0 is 0.
    return jax.lax.bitcast_convert_type(x, jnp.int32), lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)
  return x, lambda x: x


def check_room(needed: int, split: int, mesh: Mesh) -> None:
  """Raises ConfigError where what training needs on a device, of which the split takes some bytes, does not fit it."""
  available, meaning = sharding.device_memory(mesh.local_devices[0])
  if needed > available:
    raise ConfigError(
      f"data.cache = device: training needs {needed / 1e9:.2f} GB of each device, {split / 1e9:.2f} of them for the"
      f" training split, but there are {available / 1e9:.2f} GB ({meaning}). Set data.cache=memory, disk or none, use more"
      " devices, or what lowers the rest: a smaller batch_size, a larger accumulate_steps, remat=True, dtype=bfloat16."
    )


def compile_step(step, state, batch: dict, mesh: Mesh):
  """A jitted train step, compiled for abstract arguments.

  Raises:
    ConfigError: it does not fit the devices with the split in their memory.
  """
  say("compiling the training step, to see whether it fits beside the training split ...")
  compiled = step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  check_room(peak + memory.temp_size_in_bytes, sharding.bytes_per_device(batch["split"]), mesh)
  return compiled
