"""Operations that have a faster form on some platform. With `kernels = "plain"` all is computed the same without them.

One file for each operation. It begins with the plain form, which is what every platform runs that has no faster one, and
lists the others: platform, gain, the command that measures it, and when it can go. What is called a cure there stays on
every platform, because it stands against wrong results, not slow ones.
"""

import contextlib
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

# For which platform functions are traced. A part of the key of jit's caches.
_platform = jax.make_user_context("plain")


def target(mesh: Mesh, kernels: str) -> str:
  """Whose forms a step for a mesh takes, for `on` and `compiler.options`.

  Args:
    kernels: "auto": those of the platform of the mesh's devices, which need not be there. "plain", or the name of
      another platform: as it says.

  Returns:
    "cpu", "gpu" or "tpu". Under "auto" a mesh that splits the image height is a platform of its own, "split_cpu", ...:
    shifted rows would be exchanged between devices once more for each shift, and rows that are looped over or merged would
    be gathered.
  """
  if kernels != "auto":
    return kernels
  platform = mesh.devices.flat[0].platform
  platform = "gpu" if platform in ("cuda", "rocm") else platform  # As devices that are not there are called.
  return f"split_{platform}" if mesh.shape["space"] > 1 else platform


@contextlib.contextmanager
def on(platform: str) -> Iterator[None]:
  """While a function is traced under it (or decorated with it), operations take the forms of `platform`, see `target`.

  Elsewhere they take the plain ones.
  """
  with _platform(platform):
    yield


def fastest(plain, **forms: Callable):
  """The form of the platform that is traced for, of `forms` by platform, or `plain` where it has none."""
  platform = _platform.value
  return forms[platform] if platform in forms else plain
