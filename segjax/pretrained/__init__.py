"""Weights from elsewhere: each foreign naming scheme is one file that renames arrays to our paths.

Nothing is guessed and nothing is skipped in silence: every tensor of the file must have its place in the model and
the other way round, except for what the caller names in `exclude`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from segjax.config import ConfigError, patterns
from segjax.pretrained import milesial, mmseg, native, smp, tf_deeplab, timm, torchvision, vainf, wkentaro
from segjax.pretrained.peers import PEERS, build

__all__ = ["PEERS", "SCHEMES", "assign", "build", "merge_variables"]

SCHEMES = {
  "tf_deeplab": tf_deeplab.convert,
  "torchvision": torchvision.convert,
  "timm": timm.convert,
  "vainf": vainf.convert,
  "smp": smp.convert,
  "wkentaro": wkentaro.convert,
  "milesial": milesial.convert,
  "mmseg": mmseg.convert,
  "segjax": native.convert,
}


def assign(model: nnx.Module, arrays: Mapping[str, np.ndarray], scheme: str, exclude: tuple[str, ...] = ()) -> int:
  """Gives a model the weights of another framework, in place.

  The model may be abstract (`nnx.eval_shape(lambda: models.build(...))`), which saves the time of a random start; what
  `exclude` names then stays abstract.

  Args:
    arrays: by the scheme's own names.
    scheme: a key of `SCHEMES`.
    exclude: patterns of our paths (`patterns.match`: "logits", "aspp/pooling") that keep their own values and may be
      missing or of another shape in `arrays`.

  Returns:
    How many tensors were taken.

  Raises:
    ValueError: an unknown scheme, or listing every name without a meaning in the scheme, every tensor that is only on
      one side or of another shape, and every exclusion that fits nothing.
  """
  if scheme not in SCHEMES:
    raise ValueError(f"init.scheme = {scheme!r}: choose one of {', '.join(SCHEMES)}.")
  imported = SCHEMES[scheme](arrays)
  states = dict(params=nnx.state(model, nnx.Param), batch_stats=nnx.state(model, nnx.BatchStat))
  variables = {name: nnx.to_pure_dict(state) for name, state in states.items()}
  merged, taken, _ = merge_variables(variables, imported, exclude, f"the {scheme} weights")
  for name, values in merged.items():  # A network without batch norm has no batch_stats.
    placed = jax.tree.map(lambda x: x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x), values)
    nnx.replace_by_pure_dict(states[name], placed)
    nnx.update(model, states[name])
  return taken


def merge_variables(variables: dict, imported: dict, exclude: tuple[str, ...], origin: str) -> tuple[dict, int, int]:
  """Replaces weights by imported ones, strictly both ways.

  Args:
    variables, imported: {"params": ..., "batch_stats": ...}.
    exclude: patterns of paths (`patterns.match`: "logits", "up0/conv1") that keep their own weights and may be missing or
      of another shape in `imported`.
    origin: where the weights come from, for messages.

  Returns:
    The merged variables, those taken in the type of the model's; how many were taken, and of how many.

  Raises:
    ConfigError: listing every tensor that is only on one side or of another shape, or an exclusion that fits nothing.
  """
  ours, theirs = (traverse_util.flatten_dict(v, sep="/") for v in (variables, imported))

  paths = {name.partition("/")[2] for name in (*ours, *theirs)}  # Names begin with params/ or batch_stats/.
  excluded = {pattern: patterns.match(pattern, paths) for pattern in exclude}
  left = set().union(*excluded.values())
  wanted, given = ({n for n in side if n.partition("/")[2] not in left} for side in (ours, theirs))
  problems = [f"no parameter of the model matches {e!r}, nor of {origin}" for e, found in excluded.items() if not found]
  problems += [f"only in the model: {n}" for n in sorted(wanted - given)]
  problems += [f"only in {origin}: {n}" for n in sorted(given - wanted)]
  problems += [
    f"{n}: the model has {ours[n].shape}, {origin} has {theirs[n].shape}"
    for n in sorted(wanted & given)
    if ours[n].shape != theirs[n].shape
  ]
  if problems:
    raise ConfigError(
      f"The weights of {origin} do not fit the model ({len(problems)} problems; name what may differ in init.exclude):\n  "
      + "\n  ".join(problems[:40])
    )
  merged = {n: np.asarray(theirs[n], ours[n].dtype) if n in wanted else ours[n] for n in ours}
  # A model without batch norm has no batch_stats, which flattening forgets.
  empty = {name: {} for name in variables}
  return empty | traverse_util.unflatten_dict(merged, sep="/"), len(wanted), len(ours)
