"""Learning-rate schedules, optimisers, what they train and how fast, and what plateau and early stopping remember."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from segjax.config import ConfigError, patterns


def make_schedule(
  name: str,
  *,
  num_steps: int,
  base_lr: float = 0.01,
  poly_power: float = 0.9,
  end_lr: float = 0.0,
  decay_every: int = 2000,
  decay_factor: float = 0.1,
  warmup_steps: int = 0,
  warmup_lr: float = 0.0,
  warmup: str = "linear",
) -> optax.Schedule:
  """The learning rate as a function of the number of updates already made.

  The first `warmup_steps` updates are a warm-up: "linear" from `warmup_lr` to base_lr, or "constant" at `warmup_lr`. Then,
  with t from 0 to 1 over the remaining steps, "poly": end_lr + (base_lr - end_lr) * (1 - t)^poly_power (DeepLab, arXiv
  1606.00915, section 4.1); "cosine": half a cosine (SGDR, arXiv 1608.03983, equation 5); "step": base_lr *
  decay_factor^(steps so far // decay_every), never below end_lr; "constant": base_lr. After num_steps the last value stays,
  but for "step", which goes on.

  Args:
    base_lr: the learning rate that the schedule begins at, after the warm-up.
    poly_power: of poly.
    end_lr: what poly and cosine fall to; the least of step.
    decay_every: steps between the drops of the step schedule.
    decay_factor: what each of them multiplies the rate by.
    warmup_steps: the schedule spans the steps after them.
    warmup_lr: rate of the first step of a warm-up.
    warmup: "linear" from warmup_lr to base_lr, or "constant" at warmup_lr (DeepLab's slow start).

  Raises:
    ValueError: an unknown name.
  """
  span = max(num_steps - warmup_steps, 1)
  schedules = {
    "poly": lambda: optax.polynomial_schedule(base_lr, end_lr, poly_power, span),
    "cosine": lambda: optax.cosine_decay_schedule(base_lr, span, alpha=end_lr / base_lr),
    "step": lambda: optax.exponential_decay(base_lr, decay_every, decay_factor, staircase=True, end_value=end_lr),
    "constant": lambda: optax.constant_schedule(base_lr),
  }
  if name not in schedules:
    raise ValueError(f"optimizer.schedule = {name!r}: choose one of {', '.join(schedules)}.")
  # Each of optax's own schedules with a warm-up has one kind of decay, and none begins with a constant rate.
  first = warmup_lr if warmup == "constant" else base_lr
  return optax.join_schedules(
    [optax.linear_schedule(warmup_lr, first, warmup_steps), schedules[name]()], [warmup_steps]
  )


def init_policy(regime: int = 0, scale: float = 1.0) -> dict:
  """What plateau and early stopping remember between evaluations. It is part of the training state, so a resumed run has it.

  Args:
    regime: identifies what is evaluated, how and how often; scores of different regimes are not compared.
    scale: the factor that the plateau policy has already applied to the learning rate.

  Returns:
    `plateau`: the state of optax.contrib.reduce_on_plateau. `best`: float32, the highest score so far. `stale`: int32,
    evaluations since then. `regime`: int32.
  """
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, atol=1e-4, rtol=0.0).init(None)
  plateau = plateau._replace(scale=jnp.full_like(plateau.scale, scale))
  best, stale = jnp.full((), -jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
  return dict(plateau=plateau, best=best, stale=stale, regime=jnp.full((), regime, jnp.int32))


def update_policy(
  policy: dict, score, *, min_gain: float = 1e-4, plateau_factor: float = 1.0, plateau_patience: int = 5
) -> dict:
  """The state of the policies after an evaluation.

  Args:
    policy: of `init_policy` or the previous call.
    score: in [0, 1], higher is better; NaN counts as no gain.
    min_gain: by which a score must exceed the best one to count as better.
    plateau_factor: what the learning rate is multiplied by after `plateau_patience` evaluations in a row without gain.
    plateau_patience: see plateau_factor.
  """
  score = jnp.asarray(score, jnp.float32)
  better = score > policy["best"] + min_gain
  plateau = policy["plateau"]
  if plateau_factor < 1:
    reduce = optax.contrib.reduce_on_plateau(plateau_factor, plateau_patience, rtol=0.0, atol=min_gain)
    loss = jnp.where(jnp.isnan(score), jnp.inf, 1 - score)  # It looks for a minimum.
    _, plateau = reduce.update(jnp.zeros(()), plateau, value=loss)
  best = jnp.where(better, score, policy["best"])
  return policy | dict(plateau=plateau, best=best, stale=jnp.where(better, 0, policy["stale"] + 1))


def plateau_scale(policy: dict) -> jax.Array:
  """The factor that the plateau policy applies to the learning rate now."""
  return policy["plateau"].scale


def decay_mask(params) -> dict:
  """True where weight decay applies: parameters named `kernel`.

  Biases and batch norm (`bias`, `scale`) never decay, nor do depthwise convolutions (`depthwise_kernel`), which have
  too few weights to overfit (as in official DeepLab).
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def frozen_paths(freeze: Collection[str], params: dict, batch_stats: dict) -> frozenset[str]:
  """The paths that training leaves unchanged: parameters, and running statistics of frozen batch norms.

  A batch norm is frozen where its scale and its bias are: it then normalises by its running statistics in training too,
  and does not update them, as papers do with a frozen backbone.

  Args:
    freeze: patterns of parameters, see `patterns.match`.
    params, batch_stats: nested dicts.

  Raises:
    ConfigError: a pattern that matches no parameter, or patterns that match all of them.
  """
  paths = traverse_util.flatten_dict(params, sep="/").keys()
  frozen = set().union(*patterns.match_each("optimizer.freeze", freeze, paths, "parameter"))
  if frozen >= paths:
    raise ConfigError(
      f"config.optimizer.freeze = {tuple(freeze)}: freezes all {len(paths)} parameters, so nothing would be trained. Leave"
      ' some out, e.g. ("!logits",) freezes all but the classifier.'
    )
  trained = {path.rpartition("/")[0] for path in paths - frozen}
  statistics = traverse_util.flatten_dict(batch_stats, sep="/")
  return frozenset(frozen | {path for path in statistics if path.rpartition("/")[0] not in trained})


def lr_factors(lr_multipliers: Collection[str], params: dict) -> dict:
  """The factor of each parameter's learning rate, in the structure of `params`.

  Args:
    lr_multipliers: "PATTERN:FACTOR" each. The factors of all patterns that match a parameter are multiplied.
    params: those that are trained, a nested dict.

  Raises:
    ConfigError: a pattern that matches no parameter, or a factor that is not finite and above 0.
  """
  pairs = [patterns.with_factor(text) for text in lr_multipliers]
  factors = dict.fromkeys(traverse_util.flatten_dict(params, sep="/"), 1.0)
  names = [pattern for pattern, _ in pairs]
  matches = patterns.match_each("optimizer.lr_multipliers", names, factors.keys(), "trained parameter")
  for (_, factor), matched in zip(pairs, matches):
    factors |= {path: factors[path] * factor for path in matched}
  return traverse_util.unflatten_dict(factors, sep="/")


def make_optimizer(
  name: str,
  schedule: optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 1e-4,
  clip_norm: float = 0.0,
  lr_multipliers: Collection[str] = (),
) -> optax.GradientTransformation:
  """Gradient clipping, weight decay, learning-rate multipliers m and the optimiser, in that order.

  "sgd": a = momentum * a + m * (g + weight_decay * w); w -= lr * a. The learning rate multiplies outside the accumulator, so
  a schedule does not rescale past gradients. That is PyTorch's order, and TensorFlow's with weight_decay / 2 * sum(w^2) in
  the loss. "adamw": Loshchilov & Hutter 2019, b1 = momentum, b2 = 0.999; it divides by the gradient's size, so there m
  multiplies the update. Either way it acts as m times the learning rate.

  It gets the trained parameters alone: frozen ones have no state, do not decay, and do not count in the norm for clipping.

  Args:
    schedule: step -> learning rate.
    momentum: of SGD, or AdamW's b1.
    nesterov: SGD only.
    weight_decay: on dense kernels only: no bias, no batch norm, no depthwise kernel.
    clip_norm: largest global norm of the gradient of the trained parameters, before multipliers. 0: no clipping.
    lr_multipliers: factors of the learning rate, "PATTERN:FACTOR" each, with patterns as of optimizer.freeze; those of all
      patterns that match a parameter are multiplied. ("backbone:0.1",) trains a backbone slower; ("!backbone:10",
      "logits/bias:2") is official DeepLab's last_layer_gradient_multiplier, with its doubled bias.

  Raises:
    ValueError: an unknown name.
    ConfigError: by its init, what `lr_factors` raises.
  """

  def check(params):
    lr_factors(lr_multipliers, params)
    return optax.EmptyState()

  def multiply(updates, opt_state, _=None):
    return jax.tree.map(lambda u, m: u * m, updates, lr_factors(lr_multipliers, updates)), opt_state

  multipliers = optax.GradientTransformation(check, multiply) if lr_multipliers else optax.identity()
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  if name == "sgd":
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return optax.chain(clip, decay, multipliers, optax.sgd(schedule, momentum=momentum, nesterov=nesterov))
  if name == "adamw":
    return optax.chain(
      clip, optax.adamw(schedule, b1=momentum, weight_decay=weight_decay, mask=decay_mask), multipliers
    )
  raise ValueError(f"optimizer.name = {name!r}: choose sgd or adamw.")
