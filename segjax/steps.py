"""The jitted steps: pure functions of state and batch, each compiled once."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from segjax import augment, losses, metrics, sharding
from segjax.config import IGNORE_LABEL
from segjax.models import resize
from segjax.state import TrainState


def merge(graphdef: nnx.GraphDef, variables: dict) -> nnx.Module:
  """A model from its graph and {"params", "batch_stats"}; the only place where one is put together.

  Without copy=True the model would write its batch statistics into the caller's trace.
  """
  return nnx.merge(graphdef, variables["params"], variables["batch_stats"], copy=True)


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh, *, seed: int,
                    crop_size: tuple[int, int], augmentation: dict, class_weights: np.ndarray | None,
                    ema_decay: float) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:  # fmt: skip
  """One update: augment -> normalise -> forward -> loss -> gradient -> optimiser (-> EMA).

  Args:
    augmentation: keywords of `augment.augment_batch`: scale, scale_step, flip, brightness, ...
    class_weights: [K], or None for equal weights.
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
      logits = model(model.preprocess(image), train=True, key=dropout_key)
      loss = losses.softmax_cross_entropy(logits, label, ignore_label=IGNORE_LABEL, class_weights=class_weights)
      return loss, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), logits.argmax(-1))

    (loss, (batch_stats, prediction)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
      # Warmed up as TensorFlow does it, so that the average forgets the random start: at most (1 + n) / (10 + n).
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(dict(params=params, batch_stats=batch_stats), ema, 1 - decay)
    updated = TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.failed_step)

    grad_norm = optax.tree.norm(gradient)
    sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state.failed_step < 0)
    failed = jnp.where(state.failed_step < 0, state.step, state.failed_step)
    kept = TrainState(state.step, state.params, state.batch_stats, state.opt_state, state.ema, failed)
    state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, kept)

    valid = label != IGNORE_LABEL
    accuracy = (valid & (prediction == label)).sum() / jnp.maximum(valid.sum(), 1)
    return state, dict(loss=loss, grad_norm=grad_norm, pixel_accuracy=accuracy)

  return jax.jit(train_step, donate_argnums=0, out_shardings=sharding.replicated(mesh))


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh, *, num_classes: int, scales: Sequence[float],
                   flip: bool) -> Callable[[dict, dict], dict]:  # fmt: skip
  """Scores whole images at their own size against their own labels; labels are never resized.

  The image is shown at each scale (and mirrored), logits are resized to the canvas, and with more than one view the
  class probabilities are averaged. Outside `size` the canvas holds the mean pixel, and its labels are void.

  Args:
    scales: relative to the image; the size rule is official DeepLab's, trunc((n - 1) * scale + 1).
    flip: whether the mirror image is averaged in.

  Returns:
    eval_step(variables, batch) -> {"confusion": [K, K] int32, "prediction": [B, H, W] uint8}, jitted; `variables` are
    {"params", "batch_stats"}.
  """
  views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]

  def eval_step(variables: dict, batch: dict) -> dict:
    model = merge(graphdef, variables)
    h, w = batch["label"].shape[1:]
    rows = jnp.arange(h).reshape(1, h, 1, 1) < batch["size"][:, 0].reshape(-1, 1, 1, 1)
    cols = jnp.arange(w).reshape(1, 1, w, 1) < batch["size"][:, 1].reshape(-1, 1, 1, 1)
    raw = jnp.where(rows & cols, batch["image"].astype(jnp.float32), jnp.asarray(model.mean).reshape(1, 1, 1, 3))
    image = model.preprocess(raw)
    total = 0
    for scale, mirrored in views:
      view = resize.resize_bilinear(image, tuple(int((n - 1) * scale + 1) for n in (h, w)))
      logits = model(view[:, :, ::-1] if mirrored else view)
      logits = resize.resize_bilinear(logits[:, :, ::-1] if mirrored else logits, (h, w))
      total += jax.nn.softmax(logits) if len(views) > 1 else logits
    prediction = total.argmax(-1).astype(jnp.uint8)
    return dict(confusion=metrics.confusion_matrix(batch["label"], prediction, num_classes), prediction=prediction)

  out = dict(confusion=sharding.replicated(mesh), prediction=sharding.batch_sharding(mesh, 3))
  return jax.jit(eval_step, out_shardings=out)
