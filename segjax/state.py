"""The training state: what it holds, how it is created in its sharding, and the only place where a model is split."""

import dataclasses
from collections.abc import Callable, Collection

import jax
import optax
from flax import nnx, traverse_util


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """All that training carries from one step to the next, as plain nested dicts of arrays.

  Attributes:
    step: int32 scalar, updates done. Data order, augmentation, dropout and learning rate follow from it and the seed.
    params, batch_stats: {"down0": {"conv1": {"kernel": ...}}, ...}, frozen ones included.
    opt_state: of the optax optimiser, for the trained parameters alone.
    ema: {"params": ..., "batch_stats": ...}, moving averages of what is not frozen; None without ema_decay.
    failed_step: int32 scalar, the step whose loss or gradient was not finite; -1 for none. A failed state does not
      change any more, so the host may look at it later.
    policy: what plateau and early stopping remember, see `optimizer.init_policy`.
  """

  step: jax.Array
  params: dict
  batch_stats: dict
  opt_state: optax.OptState
  ema: dict | None
  failed_step: jax.Array
  policy: dict

  def variables(self) -> dict:
    """{"params", "batch_stats"} as trained."""
    return dict(params=self.params, batch_stats=self.batch_stats)

  def eval_variables(self) -> dict:
    """{"params", "batch_stats"} to evaluate with: the moving averages where there are any."""
    return overlay(self.variables(), self.ema or {})


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
  """graphdef, params, batch_stats of a model; `steps.merge` puts them together again."""
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def without(tree: dict, paths: Collection[str]) -> dict:
  """A nested dict without the leaves at these paths, as of "backbone/conv1/kernel", and without dicts left empty."""
  leaves = traverse_util.flatten_dict(tree, sep="/")
  return traverse_util.unflatten_dict({path: x for path, x in leaves.items() if path not in paths}, sep="/")


def overlay(tree: dict, part: dict) -> dict:
  """A nested dict with the leaves of `part`, which has some of its keys, in the place of its own."""
  return tree | {name: overlay(tree[name], x) if isinstance(x, dict) else x for name, x in part.items()}


def materialize(init: Callable[[], TrainState], sharding) -> TrainState:
  """Runs `init` with every array created in `sharding`, one for all or a tree of them.

  Compiled without LLVM's optimiser, which takes most of the time and gains nothing for random draws that run once: 1.2 s
  instead of 8 s for a U-Net on two cores.
  """
  return jax.jit(init, out_shardings=sharding, compiler_options={"xla_backend_optimization_level": 0})()


def with_sharding(abstract: TrainState, sharding) -> TrainState:
  """An abstract state whose arrays have `sharding`, one for all or a tree of them."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, jax.tree.broadcast(sharding, abstract)
  )
