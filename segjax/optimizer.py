"""Learning-rate schedules and optimisers, from optax."""

import jax
import jax.numpy as jnp
import optax


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
  """step -> learning rate of the update that follows `step` updates.

  First `warmup_steps` steps from `warmup_lr`: "linear" up to base_lr, or "constant" at it. Then, with t in [0, 1] over the
  remaining steps, "poly": end_lr + (base_lr - end_lr) * (1 - t)^poly_power (DeepLab, arXiv 1606.00915, section 4.1);
  "cosine": half a cosine (SGDR, arXiv 1608.03983, equation 5); "step": base_lr * decay_factor^(steps so far //
  decay_every), never below end_lr; "constant": base_lr. After num_steps the last value stays, but for "step", which goes on.

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
  """What training policies remember from one evaluation to the next; part of the training state, so resumes keep it.

  Args:
    regime: a number for what is evaluated how and how often; what is remembered of one means nothing in another.
    scale: what the learning rate is multiplied by already.

  Returns:
    `plateau`: of optax.contrib.reduce_on_plateau. `best`: float32, the highest score so far. `stale`: int32, evaluations
    since then. `regime`: int32.
  """
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, atol=1e-4, rtol=0.0).init(None)
  plateau = plateau._replace(scale=jnp.full_like(plateau.scale, scale))
  best, stale = jnp.full((), -jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
  return dict(plateau=plateau, best=best, stale=stale, regime=jnp.full((), regime, jnp.int32))


def update_policy(
  policy: dict, score, *, min_gain: float = 1e-4, plateau_factor: float = 1.0, plateau_patience: int = 5
) -> dict:
  """The policies' memory after an evaluation.

  Args:
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
  """What the learning rate is multiplied by at present."""
  return policy["plateau"].scale


def decay_mask(params) -> dict:
  """True where weight decay applies: leaves named `kernel`.

  Biases and batch norm (`bias`, `scale`) never decay, nor do depthwise convolutions (`depthwise_kernel`), which have
  too few weights to overfit (as in official DeepLab).
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def gradient_multipliers(params, head: float, bias: float) -> dict:
  """What each gradient is multiplied by (official DeepLab, get_model_gradient_multipliers).

  Args:
    params: nested dict.
    head: of everything but `backbone`, batch norm included; so of a whole U-Net.
    bias: of biases of convolutions, times `head` where they are in the head. A batch norm's shift is none.
  """

  def multiplier(path, _):
    keys = [entry.key for entry in path]
    siblings = params
    for key in keys[:-1]:
      siblings = siblings[key]
    is_bias = keys[-1] == "bias" and "scale" not in siblings
    return (1.0 if keys[0] == "backbone" else head) * (bias if is_bias else 1.0)

  return jax.tree_util.tree_map_with_path(multiplier, params)


def make_optimizer(
  name: str,
  schedule: optax.Schedule,
  *,
  momentum: float = 0.9,
  nesterov: bool = False,
  weight_decay: float = 1e-4,
  clip_norm: float = 0.0,
  head_multiplier: float = 1.0,
  bias_multiplier: float = 1.0,
) -> optax.GradientTransformation:
  """Gradient clipping, weight decay, gradient multipliers and the optimiser, in that order.

  "sgd": a = momentum * a + m * (g + weight_decay * w); w -= lr * a. The rate multiplies outside the accumulator, so a
  schedule does not rescale history. That is PyTorch's order, and TensorFlow's with weight_decay / 2 * sum(w^2) in the
  loss. "adamw": Loshchilov & Hutter 2019, b1 = momentum, b2 = 0.999; it divides by the gradient's size, so there the
  multipliers apply to the update.

  Args:
    schedule: step -> learning rate.
    momentum: of SGD, or AdamW's b1.
    nesterov: SGD only.
    weight_decay: on dense kernels only: no bias, no batch norm, no depthwise kernel.
    clip_norm: largest global norm of the raw gradient. 0: no clipping.
    head_multiplier: of the gradients of all that is not backbone (official DeepLab, last_layer_gradient_multiplier).
    bias_multiplier: of the gradients of convolutions' biases, which official DeepLab doubles.

  Raises:
    ValueError: an unknown name.
  """

  def multiply(updates, _):
    return jax.tree.map(lambda u, m: u * m, updates, gradient_multipliers(updates, head_multiplier, bias_multiplier))

  plain = head_multiplier == bias_multiplier == 1
  multipliers = optax.identity() if plain else optax.stateless(multiply)
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  if name == "sgd":
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return optax.chain(clip, decay, multipliers, optax.sgd(schedule, momentum=momentum, nesterov=nesterov))
  if name == "adamw":
    return optax.chain(
      clip, optax.adamw(schedule, b1=momentum, weight_decay=weight_decay, mask=decay_mask), multipliers
    )
  raise ValueError(f"optimizer.name = {name!r}: choose sgd or adamw.")
