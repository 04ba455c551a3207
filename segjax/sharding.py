"""The device mesh and the shardings of one program for 1 to N devices and hosts.

Axes: `data` splits the batch, `space` the image height. Axis types are Auto: arrays carry `NamedSharding`s and XLA
inserts the collectives, so batch norm and the loss are over the global batch by construction.
"""

import collections
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from segjax.config import ConfigError


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


def replicated(mesh: Mesh) -> NamedSharding:
  """The same array on every device: parameters, keys, scores."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
  """Batch over `data`; images and labels (ndim >= 3) also height over `space`."""
  return NamedSharding(mesh, PartitionSpec("data", "space") if ndim >= 3 else PartitionSpec("data"))


def check_batch(mesh: Mesh, field: str, batch_size: int, height: int) -> None:
  """Raises ConfigError, naming `field`, where the mesh does not divide the batch or the image height."""
  if batch_size % mesh.shape["data"]:
    raise ConfigError(
      f"config.{field} = {batch_size} is not divisible by the {mesh.shape['data']} devices of mesh.data. Change one."
    )
  if height % mesh.shape["space"]:
    raise ConfigError(
      f"Images of height {height} cannot be split over mesh.space = {mesh.shape['space']}. Set data.canvas_size (and"
      " crop_size) to a height it divides."
    )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of the global batch that this process must load: those of its own devices, ascending."""
  indices = batch_sharding(mesh, 1).addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def to_device(batches: Iterator[dict], mesh: Mesh, depth: int = 2) -> Iterator[dict]:
  """Turns host batches (this process's rows) into global arrays, keeping `depth` transfers ahead of their use."""

  def put(batch):
    return {
      name: jax.make_array_from_process_local_data(batch_sharding(mesh, value.ndim), value)
      for name, value in batch.items()
    }

  ahead = collections.deque()
  for batch in batches:
    ahead.append(put(batch))
    if len(ahead) > depth:
      yield ahead.popleft()
  yield from ahead
