"""Learning-rate schedules and optimisers, from optax."""

import math

import jax
import jax.numpy as jnp
import optax


def make_schedule(
  name: str, *, base_lr: float, num_steps: int, poly_power: float, warmup_steps: int, end_lr: float
) -> optax.Schedule:
  """step -> learning rate of the update that follows `step` updates.

  Warm-up: base_lr * step / warmup_steps. Then, with t in [0, 1] over the remaining steps, "poly":
  end_lr + (base_lr - end_lr) * (1 - t)^poly_power (DeepLab, arXiv 1606.00915, section 4.1); "cosine": half a cosine
  (SGDR, arXiv 1608.03983, equation 5); "constant": base_lr. After num_steps the last value stays.

  Raises:
    ValueError: an unknown name.
  """
  shapes = {
    "poly": lambda t: (1 - t) ** poly_power,
    "cosine": lambda t: 0.5 * (1 + jnp.cos(math.pi * t)),
    "constant": jnp.ones_like,
  }
  if name not in shapes:
    raise ValueError(f"optimizer.schedule = {name!r}: choose one of {', '.join(shapes)}.")

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    t = jnp.clip((step - warmup_steps) / max(num_steps - warmup_steps, 1), 0, 1)
    lr = end_lr + (base_lr - end_lr) * shapes[name](t)
    return jnp.where(step < warmup_steps, base_lr * step / max(warmup_steps, 1), lr)

  return schedule


def decay_mask(params) -> dict:
  """True where weight decay applies: leaves named `kernel`. Biases and batch norm (`bias`, `scale`) never decay."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
  name: str, schedule: optax.Schedule, *, momentum: float, nesterov: bool, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
  """Gradient clipping, weight decay and the optimiser, in the order of PyTorch.

  "sgd": a = momentum * a + (g + weight_decay * w); w -= lr * a. The rate multiplies outside the accumulator, so a
  schedule does not rescale history. "adamw": Loshchilov & Hutter 2019, b1 = momentum, b2 = 0.999.

  Args:
    schedule: step -> learning rate.
    clip_norm: largest global norm of the raw gradient; 0 for no clipping.

  Raises:
    ValueError: an unknown name.
  """
  clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
  if name == "sgd":
    decay = optax.add_decayed_weights(weight_decay, mask=decay_mask)
    return optax.chain(clip, decay, optax.sgd(schedule, momentum=momentum, nesterov=nesterov))
  if name == "adamw":
    return optax.chain(clip, optax.adamw(schedule, b1=momentum, weight_decay=weight_decay, mask=decay_mask))
  raise ValueError(f"optimizer.name = {name!r}: choose sgd or adamw.")
