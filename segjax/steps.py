"""The jitted steps: pure functions of state and batch, each compiled once."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from segjax import inference, metrics, sharding
from segjax import kernels as kernels_lib
from segjax import optimizer as optimizer_lib
from segjax.config import IGNORE_LABEL
from segjax.input_pipeline.images import RGB, Pixels
from segjax.kernels import compiler
from segjax.models import resize
from segjax.state import TrainState, overlay, without

IN_FLIGHT = 2  # Steps that the devices have been given at most: one is computed, and the next waits for it there.
THRESHOLDS = tuple(n / 20 for n in range(1, 20))  # Of the foreground's probability, swept in each evaluation.


def abstract_batch(
  mesh: Mesh, batch_size: int, canvas: tuple[int, int], pixels: Pixels = RGB, border: bool = False, cut: bool = False
) -> dict:
  """The shapes of a global batch on its canvas, see `input_pipeline`; what a step is compiled for."""
  shapes = dict(
    image=((*canvas, pixels.count), pixels.dtype), label=(canvas, np.uint8), size=((2,), np.int32), id=((), np.int32)
  )
  shapes |= dict(border=(canvas, np.float16)) if border else {}
  shapes |= dict(origin=((2,), np.int32), share=((2,), np.float32)) if cut else {}
  return {
    name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh))
    for name, (shape, dtype) in shapes.items()
  }


def merge(graphdef: nnx.GraphDef, variables: dict) -> nnx.Module:
  """A model from its graph and {"params", "batch_stats"}; the only place where one is put together.

  Without copy=True the model would write its batch statistics into the caller's trace.
  """
  return nnx.merge(graphdef, variables["params"], variables["batch_stats"], copy=True)


def keys_of(seed: int, step) -> tuple[jax.Array, jax.Array]:
  """The keys of augmentation and of dropout in a training step, counted from 0."""
  augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
  return augment_key, dropout_key


def make_train_step(
  graphdef: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  state_sharding: TrainState,
  seed: int,
  augment_batch: Callable,
  loss: Callable,
  ema_decay: float,
  frozen: Collection[str] = (),
  accumulate_steps: int = 1,
  kernels: str = "auto",
  matmul_precision: str = "default",
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
  """One update: augment -> normalise -> forward -> loss -> gradient -> optimiser (-> EMA).

  Args:
    state_sharding: of the state at rest, from `sharding.of_state`. Parameters are gathered for the step, and each device
      updates what it keeps.
    augment_batch: augment_batch(key, batch) -> image, label, border; `augment.augment_batch` with its options.
    loss: loss(logits, label, step, border, auxiliary) -> scalar, from `losses.make_loss`.
    ema_decay: 0 where the state has no `ema`.
    frozen: paths of parameters and statistics that stay as they are (`optimizer.frozen_paths`): no gradient is computed with
      respect to them, so none counts in `grad_norm`. The batch norms in `graphdef` must be frozen to match.
    accumulate_steps: number of parts, see `_make_gradient`.
    kernels: "auto" or "plain", see `kernels.target`.
    matmul_precision: of `jax.default_matmul_precision`.

  Returns:
    train_step(state, batch) -> (state, metrics), jitted; the state is donated. `batch` has global arrays `image`
    [B, H, W, C] (RGB uint8, but for `images.Pixels`), `label` [B, H, W] uint8 and `size` [B, 2] int32, and may have `border` [B, H, W], and `origin`
    and `share` [B, 2] of images that are cut (`augment.random_crop`). Metrics are scalars: `loss`, `grad_norm`,
    `pixel_accuracy` of the crops as trained on. A step whose loss or gradient is not finite leaves the state as it was
    but for `failed_step`.
  """
  platform = kernels_lib.target(mesh, kernels)
  gradient_of = _make_gradient(graphdef, mesh, loss, state_sharding.params, frozen, accumulate_steps)

  @sharding.on(mesh)
  @kernels_lib.on(platform)
  @jax.default_matmul_precision(matmul_precision)
  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    augment_key, dropout_key = keys_of(seed, state.step)
    crops = augment_batch(augment_key, batch)
    gradient, batch_stats, value, accuracy = gradient_of(state, crops, dropout_key)
    grad_norm = optax.tree.norm(gradient)
    sound = jnp.isfinite(value) & jnp.isfinite(grad_norm) & (state.failed_step < 0)
    updated = _update(state, optimizer, gradient, batch_stats, ema_decay, frozen)
    state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, _failed(state))
    return state, dict(loss=value, grad_norm=grad_norm, pixel_accuracy=accuracy)

  out = state_sharding, sharding.replicated(mesh)
  return jax.jit(train_step, donate_argnums=0, out_shardings=out, compiler_options=compiler.options("train", platform))


def _make_gradient(
  graphdef: nnx.GraphDef, mesh: Mesh, loss: Callable, params_sharding, frozen: Collection[str], parts: int
) -> Callable:
  """gradient_of(state, crops, key) -> (gradient, batch statistics, loss, pixel accuracy) of a batch.

  The gradient is with respect to all but the frozen parameters.

  Forward to gradient may happen in `parts` of the batch, one after another, each weighing as much as it has labelled
  pixels; `sharding.split_batch` says which rows each has. So a loss that is a mean over labelled pixels (cross_entropy,
  bce, focal) has the gradient of the whole batch, as long as no layer mixes examples: batch norm sees the part, and its
  running statistics are updated by each. Other losses (hard_fraction, dice, jaccard, lovasz) are means of those of the
  parts.
  """

  def part_loss(trained, params, batch_stats, part, step, labelled):
    image, label, border, key = part
    image, label = sharding.split_height(image), sharding.split_height(label)
    model, endpoints = merge(graphdef, dict(params=overlay(params, trained), batch_stats=batch_stats)), {}
    logits = model(model.preprocess(image), train=True, key=key, endpoints=endpoints, context=model.margin > 0)
    auxiliary = endpoints["auxiliary"] if "auxiliary" in endpoints else None
    if auxiliary is not None:
      auxiliary = resize.resize_bilinear(auxiliary, label.shape[1:], model.align_corners)
    value = loss(logits, label, step, border, auxiliary)
    valid = label != IGNORE_LABEL
    correct = (valid & (inference.two_classes(logits).argmax(-1) == label)).sum()
    share = valid.sum() / labelled  # 1 where there is one part.
    return share * value, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), correct)

  def gradient_of(state: TrainState, crops, key):
    variables = jax.lax.with_sharding_constraint(state.variables(), sharding.replicated(mesh))
    params = variables["params"]
    labelled = jnp.maximum((crops[1] != IGNORE_LABEL).sum(), 1)

    def add_part(totals, part):
      batch_stats, *before = totals
      (value, (batch_stats, correct)), gradient = jax.value_and_grad(part_loss, has_aux=True)(
        without(params, frozen), params, batch_stats, part, state.step, labelled
      )
      gradient = jax.lax.with_sharding_constraint(gradient, without(params_sharding, frozen))
      return (batch_stats, *jax.tree.map(jnp.add, before, [gradient, value, correct])), None

    split = (*sharding.split_batch(crops, parts, mesh), jax.random.split(key, parts))
    trained = without(state.params, frozen)
    zero = variables["batch_stats"], jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), jnp.zeros((), int)
    if parts == 1:
      # Not a loop of one turn: XLA:CPU has its fast convolutions outside of loops only.
      totals, _ = add_part(zero, jax.tree.map(lambda x: x[0], split))
    else:
      totals, _ = jax.lax.scan(add_part, zero, split)
    batch_stats, gradient, value, correct = totals
    return gradient, batch_stats, value, correct / labelled

  return gradient_of


def _update(state: TrainState, optimizer, gradient, batch_stats, ema_decay: float, frozen) -> TrainState:
  """The state after the optimiser's step."""
  trained = without(state.params, frozen)
  updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
  trained = optax.apply_updates(trained, optax.tree.scale(optimizer_lib.plateau_scale(state.policy), updates))
  params, ema = overlay(state.params, trained), state.ema
  if ema is not None:
    # Warmed up as TensorFlow does it, so that the average forgets the random start: at most (1 + n) / (10 + n).
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(dict(params=trained, batch_stats=without(batch_stats, frozen)), ema, 1 - decay)
  return TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.failed_step, state.policy)


def _failed(state: TrainState) -> TrainState:
  """The same state, with the first step that failed: this one, if none has before."""
  failed = jnp.where(state.failed_step < 0, state.step, state.failed_step)
  return TrainState(state.step, state.params, state.batch_stats, state.opt_state, state.ema, failed, state.policy)


def make_moments_step(
  graphdef: nnx.GraphDef,
  mesh: Mesh,
  *,
  seed: int,
  augment_batch: Callable,
  kernels: str = "auto",
  matmul_precision: str = "default",
) -> Callable[[dict, dict, int], dict]:
  """What each batch norm is given for a training batch, while all of them normalise by their running statistics.

  Args:
    augment_batch: as of `make_train_step`.
    kernels: "auto" or "plain", see `kernels.target`.
    matmul_precision: of `jax.default_matmul_precision`.

  Returns:
    moments_step(variables, batch, number) -> the `batch_stats` whose mean and variance (not the unbiased one) are those of
    this batch, jitted; of the crops that training would have in its step `number`.
  """

  platform = kernels_lib.target(mesh, kernels)

  @sharding.on(mesh)
  @kernels_lib.on(platform)
  @jax.default_matmul_precision(matmul_precision)
  def moments_step(variables: dict, batch: dict, number: jax.Array) -> dict:
    network = merge(graphdef, variables)
    key, _ = keys_of(seed, number)
    image = sharding.split_height(augment_batch(key, batch)[0])
    network.set_attributes(measures=True)
    network(network.preprocess(image), context=network.margin > 0)
    return nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  options = compiler.options("eval", platform)
  return jax.jit(moments_step, out_shardings=sharding.replicated(mesh), compiler_options=options)


def make_eval_step(
  graphdef: nnx.GraphDef,
  mesh: Mesh,
  *,
  num_classes: int,
  protocol: dict,
  outside: str = "void",
  sigmoid: bool = False,
  threshold: float = 0.5,
  kernels: str = "auto",
  matmul_precision: str = "default",
) -> Callable[[dict, dict], dict]:
  """Scores whole images at their own size against their own labels; labels are never resized.

  Labels outside `size` are void.

  Args:
    protocol, outside, sigmoid, threshold: of `inference.predict`.
    kernels: "auto" or "plain", see `kernels.target`.
    matmul_precision: of `jax.default_matmul_precision`.

  Returns:
    eval_step(variables, batch) -> {"prediction": [B, H, W] uint8} and what `metrics.Totals` adds up: "confusion", "boundary",
    "images" (see `metrics.image_counts`), "reliability" and the batch's "id"; jitted. `variables` are {"params",
    "batch_stats"}. Of two classes also "probability", [B, H, W] uint8: the second's, 0 to 255 for 0 to 1.
    Under `sigmoid` also "sweep", [19, 2, 2] int32: the confusion at each of `THRESHOLDS`.
  """
  platform = kernels_lib.target(mesh, kernels)

  @sharding.on(mesh)
  @kernels_lib.on(platform)
  @jax.default_matmul_precision(matmul_precision)
  def eval_step(variables: dict, batch: dict) -> dict:
    model = merge(graphdef, variables)
    prediction, scores = inference.predict(
      model,
      batch["image"],
      batch["size"],
      outside=outside,
      sigmoid=sigmoid,
      threshold=threshold,
      protocol=protocol,
    )
    out = {}
    if num_classes == 2:
      probability = inference.foreground_probability(scores, **protocol)
      out["probability"] = jnp.round(255 * probability).astype(jnp.uint8)
    if sigmoid:
      out["sweep"] = metrics.confusion_at_thresholds(batch["label"], probability, THRESHOLDS)
      confidence = jnp.where(prediction == 1, probability, 1 - probability)
    else:
      confidence = inference.confidence(scores, **protocol)
    # Whole images are put together from these, not from the scores.
    prediction, confidence = sharding.split_height(prediction), sharding.split_height(confidence)
    prediction = jax.lax.with_sharding_constraint(prediction, images)  # A boundary's surroundings are on other devices.
    out["reliability"] = metrics.reliability_counts(batch["label"], prediction, confidence, num_classes)
    counts = metrics.image_counts(batch["label"], prediction, batch["size"], num_classes)
    return out | counts | dict(prediction=prediction, id=batch["id"])

  images, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  out = dict.fromkeys(("confusion", "boundary", "images", "reliability", "id"), everywhere) | dict(prediction=images)
  out |= dict(probability=images) if num_classes == 2 else {}
  out |= dict(sweep=everywhere) if sigmoid else {}
  return jax.jit(eval_step, out_shardings=out, compiler_options=compiler.options("eval", platform))
