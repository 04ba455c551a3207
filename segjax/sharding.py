"""The device mesh and the shardings of one program for 1 to N devices and hosts.

Axes: `data` splits the batch, `space` the image height. Axis types are Auto: arrays carry `NamedSharding`s and XLA
inserts the collectives, so batch norm and the loss are over the global batch by construction.

Batches come with whole images on each device of `space`, and the height is split inside the jitted step, where a size
need not divide. Left alone there, XLA splits some feature maps over a part of the axis, and its convolutions then have
wrong gradients with respect to the kernel (see `split_height`).
"""

import collections
import concurrent.futures
import contextlib
import math
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from segjax.config import ConfigError

AHEAD = 2  # Batches that `to_device` keeps on the devices beside the one in use.


def make_mesh(data: int = -1, space: int = 1, devices=None) -> Mesh:
  """A ("data", "space") mesh over all devices (or `devices`), or over the first of them where both sizes say fewer.

  Args:
    data: devices along the batch; -1 for all that `space` leaves.
    space: devices along the image height.

  Raises:
    ConfigError: more than there are, or, on several processes, not all of them.
  """
  devices = jax.devices() if devices is None else devices
  wanted = space * (max(len(devices) // space, 1) if data == -1 else data)
  if wanted > len(devices) or (wanted < len(devices) and (data == -1 or jax.process_count() > 1)):
    raise ConfigError(
      f"config.mesh = (data={data}, space={space}) does not fit {len(devices)} devices in {jax.process_count()}"
      " process(es). Set mesh.data=-1 and a mesh.space that divides their number."
    )
  sizes = (wanted // space, space)
  return jax.make_mesh(sizes, ("data", "space"), axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


WHOLE = 2**12  # Elements up to which an array of the state is not worth splitting.


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device: parameters, keys, scores."""
  return NamedSharding(mesh, PartitionSpec())


def of_state(mesh: Mesh, abstract, shard: bool):
  """The sharding of each array of a training state, at rest between steps.

  Args:
    abstract: a pytree of shapes.
    shard: along the largest dimension that mesh.data divides, where there is one; small arrays stay whole. Off: all
      are replicated.
  """

  def of_leaf(leaf) -> NamedSharding:
    dims = [n for n, size in enumerate(leaf.shape) if size % mesh.shape["data"] == 0]
    if not shard or math.prod(leaf.shape) <= WHOLE or not dims:
      return replicated(mesh)
    widest = max(dims, key=lambda n: leaf.shape[n])
    return NamedSharding(mesh, PartitionSpec(*(None,) * widest, "data"))

  return jax.tree.map(of_leaf, abstract)


def gather(tree, mesh: Mesh):
  """The same arrays, whole on every device; arrays of the host may be among them."""
  return jax.device_put(tree, replicated(mesh))


def split_batch(batch, parts: int, mesh: Mesh):
  """Arrays [B, ...] into [parts, B / parts, ...]: part m has rows m, m + parts, m + 2 parts, ... whatever the mesh.

  So each device has as many rows of every part, all of which it holds already.
  """

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, "data", *rest)))

  return jax.tree.map(split, batch)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Batch over `data`, whole images."""
  return NamedSharding(mesh, PartitionSpec("data"))


@contextlib.contextmanager
def on(mesh: Mesh) -> Iterator[None]:
  """While a function is traced under it (or decorated with it), `split_height` splits over this mesh."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def batch_parts() -> int:
  """Into how many parts the mesh that is being traced for (see `on`) splits the batch; 1 where there is none."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else mesh.shape["data"]


def on_all(x: jax.Array) -> jax.Array:
  """An array whose parts are on the devices of the mesh that is being traced for, whole on each of them."""
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def split_height(x: jax.Array, *others: int) -> jax.Array:
  """Pins [B, H, ...] to batch over `data` and height over `space`; x itself where there is no mesh (see `on`).

  Convolutions need it on both sides, for the value and, as its transpose is itself, for the gradient. XLA (jax 0.10.2
  and 0.12.0) gives silently wrong gradients of a convolution whose feature map is split over a part of an axis (it
  multiplies the kernel's by the size of the rest), as it chooses for 10 rows on 4 devices; or which leaves a device
  without rows. So a feature map is split over all of `space`, each device having at least one row, or not at all.

  Args:
    others: heights of the feature maps that x becomes or came from in the same convolution: all are split, or none.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  space = mesh.shape["space"]
  empty = any((space - 1) * -(-rows // space) >= rows for rows in (x.shape[1], *others))
  return jax.lax.with_sharding_constraint(x, PartitionSpec("data", None if empty else "space"))


def check_batch(mesh: Mesh, field: str, batch_size: int, parts: int = 1) -> None:
  """Raises ConfigError, naming `field`, where the mesh does not divide the batch, or each of its parts."""
  if batch_size % (mesh.shape["data"] * parts):
    each = f" times accumulate_steps = {parts}" if parts > 1 else ""
    raise ConfigError(
      f"config.{field} = {batch_size} is not divisible by the {mesh.shape['data']} devices of mesh.data{each}. Change"
      " one."
    )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of the global batch that this process must load: those of its own devices, ascending."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_device(batches: Iterator[dict], mesh: Mesh) -> Iterator[dict]:
  """Turns host batches (this process's rows) into global arrays, `AHEAD` of them before they are asked for.

  A thread of its own takes them from `batches` and transfers them, so that the device need not wait for either. What
  `batches` raises is raised where the batch is asked for that it stands for.
  """

  def put(batch):
    return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), value) for name, value in batch.items()}

  arrays = map(put, batches)
  thread = concurrent.futures.ThreadPoolExecutor(1, "to_device")
  try:
    ahead = collections.deque(thread.submit(next, arrays, None) for _ in range(AHEAD))
    while (batch := ahead.popleft().result()) is not None:
      ahead.append(thread.submit(next, arrays, None))
      yield batch
  finally:
    thread.shutdown(cancel_futures=True)


def bytes_per_device(tree) -> int:
  """Of abstract arrays that have shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(device: jax.Device) -> tuple[int, str]:
  """Bytes that a device of this machine has for JAX, and what they are."""
  stats = device.memory_stats()
  if stats is not None:
    return stats["bytes_limit"], f"memory of {device.device_kind} that JAX may use"
  count = jax.local_device_count()
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count, (
    "host memory" if count == 1 else f"host memory, which {count} devices share"
  )
