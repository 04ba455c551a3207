"""The jitted steps: pure functions of state and batch, each compiled once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from segjax import augment, inference, metrics, sharding
from segjax.config import IGNORE_LABEL
from segjax.models import resize
from segjax.state import TrainState


def merge(graphdef: nnx.GraphDef, variables: dict) -> nnx.Module:
  """A model from its graph and {"params", "batch_stats"}; the only place where one is put together.

  Without copy=True the model would write its batch statistics into the caller's trace.
  """
  return nnx.merge(graphdef, variables["params"], variables["batch_stats"], copy=True)


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int,
                    crop_size: tuple[int, int], augmentation: dict, loss: Callable,
                    auxiliary_weight: float, ema_decay: float) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:  # fmt: skip
  """One update: augment -> normalise -> forward -> loss -> gradient -> optimiser (-> EMA).

  Args:
    augmentation: keywords of `augment.augment_batch`: scale, scale_step, flip, brightness, ...
    loss: loss(logits, label, step) -> scalar, from `losses.make_loss`.
    auxiliary_weight: of the same loss on the logits of an auxiliary head, where the model has one.
    ema_decay: 0 where the state has no `ema`.

  Returns:
    train_step(state, batch) -> (state, metrics), jitted; the state is donated. `batch` has global arrays `image`
    [B, H, W, 3] uint8, `label` [B, H, W] uint8 and `size` [B, 2] int32. Metrics are scalars: `loss`, `grad_norm`,
    `pixel_accuracy` of the crops as trained on. A step whose loss or gradient is not finite leaves the state as it was
    but for `failed_step`.
  """

  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    fill = merge(graphdef, state.variables()).mean
    image, label = augment.augment_batch(
      augment_key, batch["image"], batch["label"], batch["size"], crop_size=crop_size, fill=fill,
      ignore_label=IGNORE_LABEL, **augmentation,
    )  # fmt: skip
    image = jax.lax.with_sharding_constraint(image, sharding.batch_sharding(mesh, image.ndim))
    label = jax.lax.with_sharding_constraint(label, sharding.batch_sharding(mesh, label.ndim))

    def loss_fn(params):
      model = merge(graphdef, dict(params=params, batch_stats=state.batch_stats))
      endpoints = {}
      logits = model(model.preprocess(image), train=True, key=dropout_key, endpoints=endpoints)
      value = loss(logits, label, state.step)
      if "auxiliary" in endpoints:
        auxiliary = resize.resize_bilinear(endpoints["auxiliary"], label.shape[1:], model.align_corners)
        value += auxiliary_weight * loss(auxiliary, label, state.step)
      return value, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), logits.argmax(-1))

    (value, (batch_stats, prediction)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      # Warmed up as TensorFlow does it, so that the average forgets the random start: at most (1 + n) / (10 + n).
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(dict(params=params, batch_stats=batch_stats), ema, 1 - decay)
    updated = TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.failed_step)

    grad_norm = optax.tree.norm(gradient)
    sound = jnp.isfinite(value) & jnp.isfinite(grad_norm) & (state.failed_step < 0)
    failed = jnp.where(state.failed_step < 0, state.step, state.failed_step)
    kept = TrainState(state.step, state.params, state.batch_stats, state.opt_state, state.ema, failed)
    state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, kept)

    valid = label != IGNORE_LABEL
    accuracy = (valid & (prediction == label)).sum() / jnp.maximum(valid.sum(), 1)
    return state, dict(loss=value, grad_norm=grad_norm, pixel_accuracy=accuracy)

  return jax.jit(train_step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh, *, num_classes: int,
                   protocol: dict) -> Callable[[dict, dict], dict]:  # fmt: skip
  """Scores whole images at their own size against their own labels; labels are never resized.

  Outside `size` the canvas holds the mean pixel, and its labels are void.

  Args:
    protocol: keywords of `inference.class_scores`: scales, flip, window, window_stride.

  Returns:
    eval_step(variables, batch) -> {"confusion": [K, K] int32, "prediction": [B, H, W] uint8}, jitted; `variables` are
    {"params", "batch_stats"}.
  """

  def eval_step(variables: dict, batch: dict) -> dict:
    model = merge(graphdef, variables)
    image = model.preprocess(inference.blank_padding(batch["image"], batch["size"], model.mean))
    prediction = inference.class_scores(model, image, **protocol).argmax(-1).astype(jnp.uint8)
    return dict(confusion=metrics.confusion_matrix(batch["label"], prediction, num_classes), prediction=prediction)

  out = dict(confusion=sharding.replicated(mesh), prediction=sharding.batch_sharding(mesh, 3))
  return jax.jit(eval_step, out_shardings=out)
