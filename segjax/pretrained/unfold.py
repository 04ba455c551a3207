"""Batch norm by the statistics of other images, or where it was folded away: the same function, ready to be trained."""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx, traverse_util

from segjax.models import layers


def total(batches: Iterable[dict]) -> dict:
  """`batch_stats` of all batches together, float64.

  Args:
    batches: those of each, from `steps.make_moments_step`; of equally many pixels.
  """
  flat = [traverse_util.flatten_dict(jax.device_get(batch)) for batch in batches]
  found = {}
  for *layer, leaf in flat[0]:
    if leaf == "mean":
      mean, var = (np.float64([batch[*layer, leaf] for batch in flat]) for leaf in ("mean", "var"))
      found[*layer, "mean"], found[*layer, "var"] = mean.mean(0), var.mean(0) + mean.var(0)
  return traverse_util.unflatten_dict(found)


def unfold(network: nnx.Module, variables: dict, measured: dict) -> dict:
  """Gives each batch norm other running statistics, and the scale and bias with which it computes what it did.

  By the statistics of its batch, as in training, it then computes nearly the same, which a folded one does not.

  Args:
    network: may be abstract.
    variables: {"params", "batch_stats"} on the host.
    measured: `batch_stats` of the inputs, from `total`.
  """
  new = {name: traverse_util.flatten_dict(tree) for name, tree in variables.items()}
  measured = traverse_util.flatten_dict(measured)
  for path, norm in nnx.iter_modules(network):
    if isinstance(norm, layers.BatchNorm):
      places = [("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var")]
      scale, bias, mean, var = (np.float64(new[name][*path, leaf]) for name, leaf in places)
      gain = scale / np.sqrt(var + norm.epsilon)
      shift, var = measured[*path, "mean"], measured[*path, "var"]
      values = gain * np.sqrt(var + norm.epsilon), bias + (shift - mean) * gain, shift, var
      for (name, leaf), value in zip(places, values):
        new[name][*path, leaf] = np.asarray(value, new[name][*path, leaf].dtype)
  return {name: traverse_util.unflatten_dict(tree) for name, tree in new.items()}
