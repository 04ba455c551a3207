"""The training state: its parts, its birth in its sharding, and the only place where a model is split."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from segjax import models
from segjax import optimizer as optimizer_lib
from segjax.config import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """All that training carries from one step to the next, as plain nested dicts of arrays.

  Attributes:
    step: int32 scalar, updates done. Data order, augmentation, dropout and learning rate follow from it and the seed.
    params, batch_stats: {"down0": {"conv1": {"kernel": ...}}, ...}.
    opt_state: of the optax optimiser.
    ema: {"params": ..., "batch_stats": ...}, moving averages; None without ema_decay.
    failed_step: int32 scalar, the step whose loss or gradient was not finite; -1 for none. A failed state does not
      change any more, so the host can look at it when it comes to it.
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
    return self.variables() if self.ema is None else self.ema


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
  """graphdef, params, batch_stats of a model; `steps.apply` puts them together again."""
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def build(config, num_classes: int):
  """Everything that a config says about model and optimiser.

  Returns:
    graphdef, optimizer, schedule, init. `init()` is the initial TrainState: call it through `materialize`, or under
    `jax.eval_shape` for the abstract state that a checkpoint is restored into.

  Raises:
    ConfigError: a model option out of range, a sigmoid head for other than two classes, or a crop smaller than the model's stride.
  """
  if config.head == "sigmoid" and num_classes != 2:
    raise ConfigError(
      f"config.head = 'sigmoid' tells foreground from background, but the data set has {num_classes} classes. Set head ="
      " 'softmax', or map the masks to two classes (data.label_map)."
    )
  o = config.optimizer
  schedule = optimizer_lib.make_schedule(
    o.schedule, base_lr=o.base_lr, num_steps=config.num_steps, poly_power=o.poly_power, end_lr=o.end_lr,
    decay_every=o.decay_every, decay_factor=o.decay_factor, warmup_steps=o.warmup_steps, warmup_lr=o.warmup_lr,
    warmup=o.warmup,
  )  # fmt: skip
  optimizer = optimizer_lib.make_optimizer(
    o.name, schedule, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay, clip_norm=o.clip_norm,
    head_multiplier=o.head_multiplier, bias_multiplier=o.bias_multiplier,
  )  # fmt: skip

  def build_model() -> nnx.Module:
    return models.build(
      num_classes=1 if config.head == "sigmoid" else num_classes,
      dtype=config.dtype,
      remat=config.remat,
      rngs=nnx.Rngs(config.seed),
      **config.model,
    )

  def init() -> TrainState:
    _, params, batch_stats = split(build_model())
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=optimizer.init(params),
      # Copies: a donated state must not hold one buffer twice.
      ema=jax.tree.map(jnp.copy, dict(params=params, batch_stats=batch_stats)) if o.ema_decay else None,
      failed_step=jnp.full((), -1, jnp.int32),
      policy=optimizer_lib.init_policy(),
    )

  try:
    model = nnx.eval_shape(build_model)
  except ValueError as error:  # Models know nothing of configs.
    raise ConfigError(f"The model cannot be built: {error}") from error
  if min(config.crop_size) < model.stride:
    raise ConfigError(
      f"config.crop_size = {tuple(config.crop_size)}: smaller than the network's stride of {model.stride}, so nothing of"
      " it would be left. Enlarge the crop, or lower the model's stride."
    )
  return nnx.graphdef(model), optimizer, schedule, init


def materialize(init: Callable[[], TrainState], sharding) -> TrainState:
  """Runs `init` with every array born in `sharding`, one for all or a tree of them.

  Compiled without LLVM's optimiser: the many random draws, used once, would take it seven times as long (8 s against
  1.2 s for a U-Net on two cores).
  """
  return jax.jit(init, out_shardings=sharding, compiler_options={"xla_backend_optimization_level": 0})()


def with_sharding(abstract: TrainState, sharding) -> TrainState:
  """An abstract state whose arrays have `sharding`, one for all or a tree of them."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, jax.tree.broadcast(sharding, abstract)
  )
