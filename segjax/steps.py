"""The jitted steps: pure functions of state and batch, each compiled once."""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from segjax import augment, inference, metrics, sharding
from segjax import kernels as kernels_lib
from segjax import optimizer as optimizer_lib
from segjax.config import IGNORE_LABEL
from segjax.kernels import compiler
from segjax.models import resize
from segjax.state import TrainState, overlay, without

IN_FLIGHT = 2  # Steps that the devices have been given at most: one is computed, and the next waits for it there.
THRESHOLDS = tuple(n / 20 for n in range(1, 20))  # Of the foreground's probability, swept in each evaluation.


def abstract_batch(
  mesh: Mesh, batch_size: int, canvas: tuple[int, int], border: bool = False, cut: bool = False
) -> dict:
  """The shapes of a global batch on its canvas, see `input_pipeline`; what a step is compiled for."""
  shapes = dict(image=((*canvas, 3), np.uint8), label=(canvas, np.uint8), size=((2,), np.int32), id=((), np.int32))
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


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, mesh: Mesh, *,
                    state_sharding: TrainState, seed: int, crop_size: tuple[int, int], augmentation: dict,
                    loss: Callable, auxiliary_weight: float, ema_decay: float, frozen: Collection[str] = (),
                    accumulate_steps: int = 1, kernels: str = "auto", matmul_precision: str = "default",
                    ) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:  # fmt: skip
  """One update: augment -> normalise -> forward -> loss -> gradient -> optimiser (-> EMA).

  Forward to gradient may happen in parts of the batch, one after another (`accumulate_steps`), each weighing as much as it
  has labelled pixels. So a loss that is a mean over labelled pixels (cross_entropy, bce, focal) has the gradient of the
  whole batch, as long as no layer mixes examples: batch norm sees the part, and its running statistics are updated by
  each. Other losses (hard_fraction, dice, jaccard, lovasz) are means of those of the parts.

  Args:
    state_sharding: of the state at rest, from `sharding.of_state`. Parameters are gathered for the step, and each device
      updates what it keeps.
    augmentation: keywords of `augment.augment_batch`: scale, scale_step, flip, brightness, ...
    loss: loss(logits, label, step, border) -> scalar, from `losses.make_loss`.
    auxiliary_weight: of the same loss on the logits of an auxiliary head, where the model has one.
    ema_decay: 0 where the state has no `ema`.
    frozen: paths of parameters and statistics that stay as they are (`optimizer.frozen_paths`): no gradient is computed with
      respect to them, so none counts in `grad_norm`. The batch norms in `graphdef` must be frozen to match.
    accumulate_steps: number of parts; see `sharding.split_batch` for which rows they have.
    kernels: which forms of operations, see `kernels.target`.
    matmul_precision: of `jax.default_matmul_precision`.

  Returns:
    train_step(state, batch) -> (state, metrics), jitted; the state is donated. `batch` has global arrays `image`
    [B, H, W, 3] uint8, `label` [B, H, W] uint8 and `size` [B, 2] int32, and may have `border` [B, H, W], and `origin`
    and `share` [B, 2] of images that are cut (`augment.random_crop`). Metrics are
    scalars: `loss`, `grad_norm`, `pixel_accuracy` of the crops as trained on. A step whose loss or gradient is not finite
    leaves the state as it was but for `failed_step`.
  """

  platform = kernels_lib.target(mesh, kernels)

  @sharding.on(mesh)
  @kernels_lib.on(platform)
  @jax.default_matmul_precision(matmul_precision)
  def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
    variables = jax.lax.with_sharding_constraint(state.variables(), sharding.replicated(mesh))
    network = merge(graphdef, variables)
    image, label, border = _crops(augment_key, network, batch, dict(crop_size=crop_size, **augmentation))
    context = dict(context=True) if network.margin else {}
    labelled = jnp.maximum((label != IGNORE_LABEL).sum(), 1)

    def loss_fn(trained, batch_stats, image, label, border, key):
      image, label = sharding.split_height(image), sharding.split_height(label)
      params = overlay(variables["params"], trained)
      model = merge(graphdef, dict(params=params, batch_stats=batch_stats))
      endpoints = {}
      logits = model(model.preprocess(image), train=True, key=key, endpoints=endpoints, **context)
      value = loss(logits, label, state.step, border)
      if "auxiliary" in endpoints:
        auxiliary = resize.resize_bilinear(endpoints["auxiliary"], label.shape[1:], model.align_corners)
        value += auxiliary_weight * loss(auxiliary, label, state.step, border)
      valid = label != IGNORE_LABEL
      correct = (valid & (inference.two_classes(logits).argmax(-1) == label)).sum()
      share = valid.sum() / labelled  # 1 where there is one part.
      return share * value, (nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), correct)

    def add_part(sums, part):
      batch_stats, *before = sums
      (value, (batch_stats, correct)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
        without(variables["params"], frozen), batch_stats, *part
      )
      gradient = jax.lax.with_sharding_constraint(gradient, without(state_sharding.params, frozen))
      return (batch_stats, *jax.tree.map(jnp.add, before, [gradient, value, correct])), None

    parts = sharding.split_batch((image, label, border), accumulate_steps, mesh)
    keys = jax.random.split(dropout_key, accumulate_steps)
    trained = without(state.params, frozen)
    nothing = variables["batch_stats"], jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), jnp.zeros((), int)
    if accumulate_steps == 1:
      # Not a loop of one turn: XLA:CPU brings convolutions into a form it has fast code for outside of loops only.
      sums, _ = add_part(nothing, jax.tree.map(lambda x: x[0], (*parts, keys)))
    else:
      sums, _ = jax.lax.scan(add_part, nothing, (*parts, keys))
    batch_stats, gradient, value, correct = sums
    updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
    trained = optax.apply_updates(trained, optax.tree.scale(optimizer_lib.plateau_scale(state.policy), updates))
    params = overlay(state.params, trained)
    ema = state.ema
    if ema is not None:
      # Warmed up as TensorFlow does it, so that the average forgets the random start: at most (1 + n) / (10 + n).
      decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(dict(params=trained, batch_stats=without(batch_stats, frozen)), ema, 1 - decay)
    updated = TrainState(state.step + 1, params, batch_stats, opt_state, ema, state.failed_step, state.policy)

    grad_norm = optax.tree.norm(gradient)
    sound = jnp.isfinite(value) & jnp.isfinite(grad_norm) & (state.failed_step < 0)
    failed = jnp.where(state.failed_step < 0, state.step, state.failed_step)
    kept = TrainState(state.step, state.params, state.batch_stats, state.opt_state, state.ema, failed, state.policy)
    state = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, kept)

    return state, dict(loss=value, grad_norm=grad_norm, pixel_accuracy=correct / labelled)

  out = state_sharding, sharding.replicated(mesh)
  return jax.jit(train_step, donate_argnums=0, out_shardings=out, compiler_options=compiler.options("train", platform))


def _crops(key: jax.Array, network: nnx.Module, batch: dict, augmentation: dict):
  """The (image, label, border) that a network is trained on; border is None where the batch has none."""
  border = batch["border"] if "border" in batch else None
  window = (batch["origin"], batch["share"]) if "origin" in batch else None
  return augment.augment_batch(
    key, batch["image"], batch["label"], batch["size"], border, window, fill=network.mean, ignore_label=IGNORE_LABEL,
    margin=network.margin, **augmentation,
  )  # fmt: skip


def make_moments_step(graphdef: nnx.GraphDef, mesh: Mesh, *, seed: int, augmentation: dict,
                      kernels: str = "auto", matmul_precision: str = "default",
                      ) -> Callable[[dict, dict, int], dict]:  # fmt: skip
  """What each batch norm is given for a training batch, while all of them normalise by their running statistics.

  Args:
    augmentation: keywords of `augment.augment_batch`, the crop's size among them.
    kernels: which forms of operations, see `kernels.target`.
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
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), number))
    image = sharding.split_height(_crops(key, network, batch, augmentation)[0])
    network.set_attributes(measures=True)
    network(network.preprocess(image), **(dict(context=True) if network.margin else {}))
    return nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  options = compiler.options("eval", platform)
  return jax.jit(moments_step, out_shardings=sharding.replicated(mesh), compiler_options=options)


def make_eval_step(graphdef: nnx.GraphDef, mesh: Mesh, *, num_classes: int,
                   protocol: dict, outside: str = "void", sigmoid: bool = False,
                   threshold: float = 0.5, kernels: str = "auto", matmul_precision: str = "default",
                   ) -> Callable[[dict, dict], dict]:  # fmt: skip
  """Scores whole images at their own size against their own labels; labels are never resized.

  Labels outside `size` are void.

  Args:
    protocol: keywords of `inference.class_scores`: scales, flip, window, window_stride.
    outside: what the canvas shows there: "void", the mean pixel, or "mirror".
    sigmoid: whether the model has one logit, that of the second of two classes,
    threshold: which is predicted where its probability lies above this.
    kernels: which forms of operations, see `kernels.target`.
    matmul_precision: of `jax.default_matmul_precision`.

  Returns:
    eval_step(variables, batch) -> {"confusion": [K, K] int32, "prediction": [B, H, W] uint8}, jitted; `variables` are
    {"params", "batch_stats"}. Of two classes also "probability", [B, H, W] uint8: the second's, 0 to 255 for 0 to 1.
    Under `sigmoid` also "sweep", [19, 2, 2] int32: the confusion at each of `THRESHOLDS`.
  """

  platform = kernels_lib.target(mesh, kernels)

  @sharding.on(mesh)
  @kernels_lib.on(platform)
  @jax.default_matmul_precision(matmul_precision)
  def eval_step(variables: dict, batch: dict) -> dict:
    model = merge(graphdef, variables)
    if outside == "mirror":
      image = inference.mirrored_padding(batch["image"], batch["size"])
    else:
      image = inference.blank_padding(batch["image"], batch["size"], model.mean)
    image = sharding.split_height(image)
    image = model.preprocess(image)
    scores = inference.class_scores(model, image, **protocol)
    out = {}
    if num_classes == 2:
      probability = inference.foreground_probability(scores, **protocol)
      out["probability"] = jnp.round(255 * probability).astype(jnp.uint8)
    if sigmoid:
      prediction = (probability > threshold).astype(jnp.uint8)
      out["sweep"] = metrics.confusion_at_thresholds(batch["label"], probability, THRESHOLDS)
    else:
      prediction = scores.argmax(-1).astype(jnp.uint8)
    prediction = sharding.split_height(prediction)  # Whole images are put together from it, not from the scores.
    confusion = metrics.confusion_matrix(batch["label"], prediction, num_classes)
    return out | dict(confusion=confusion, prediction=prediction)

  images = sharding.batch_sharding(mesh)
  out = dict(confusion=sharding.replicated(mesh), prediction=images)
  out |= dict(probability=images) if num_classes == 2 else {}
  out |= dict(sweep=sharding.replicated(mesh)) if sigmoid else {}
  return jax.jit(eval_step, out_shardings=out, compiler_options=compiler.options("eval", platform))
