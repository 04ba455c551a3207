"""The models by name: the `base.Network` of each file here is called as the file."""

import importlib

import jax.numpy as jnp
from flax import nnx

from segjax.config.options import networks
from segjax.models.base import Network

MODELS = {
  name: getattr(importlib.import_module(f"segjax.{module}"), class_name)
  for name, (module, _, class_name) in ((name, origin.rpartition(".")) for name, origin in networks().items())
}


def build(
  name: str, *, num_classes: int, statistics=None, dtype="float32", remat: bool = False, rngs: nnx.Rngs, **options
) -> Network:
  """Builds a model; call under `jax.jit` or `jax.eval_shape`, as eager initialisation takes seconds.

  Args:
    name: a key of `MODELS`.
    num_classes: channels of the logits.
    statistics: see `base.Network`; their number is that of the image's channels.
    dtype: of the computation.
    remat: whether the backward pass computes the inner results of each block again instead of keeping them.
    options: of the model's constructor.

  Raises:
    ValueError: an unknown name (lists the known ones) or an option out of range.
  """
  if name not in MODELS:
    raise ValueError(f"model.name = {name!r}: choose one of {', '.join(MODELS)}.")
  channels = {} if statistics is None else dict(channels=len(statistics[0]))
  model = MODELS[name](num_classes=num_classes, dtype=jnp.dtype(dtype), rngs=rngs, **channels, **options)
  if statistics is not None:
    model.mean, model.statistics = statistics[0], statistics
  if remat:
    model.set_attributes(remat=True)
  return model
