"""Training, from a config to a scored checkpoint, top to bottom in the order things happen."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from segjax import augment, evaluate, input_pipeline, losses, sharding, steps
from segjax import optimizer as optimizer_lib
from segjax.config import IGNORE_LABEL, ConfigError
from segjax.files import atomic
from segjax.input_pipeline import inventory, order, scan
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.models import layers
from segjax.run import distributed, report, task, warm_start
from segjax.run.checkpoint import Checkpoints
from segjax.run.examples import check_examples
from segjax.run.workdir import claim_workdir, named_failures, open_checkpoints
from segjax.state import TrainState, build, materialize, with_sharding
from segjax.validation import Validation


class NonFiniteLoss(RuntimeError):
  """The loss or a gradient became infinite or NaN; the message names the step and what to try."""


@report.lasting_output()
def train(config, workdir) -> dict[str, float]:
  """Trains and evaluates as `config` says, resuming whatever `workdir` holds.

  Returns:
    The scores of the last evaluation, e.g. {"val/mean_iou": ...}; empty where the run was complete already.

  Raises:
    ConfigError: `workdir` belongs to a run with another config (names the fields), or mesh, model, weights or class
      weights do not fit.
    DataError: the data set cannot be used, or an example of the evaluation split, for which see the message.
    NonFiniteLoss: training diverged; the last good checkpoint is kept.
    workdir.WorkdirError: the workdir can no longer be written; its complete checkpoints are kept.
  """
  workdir = pathlib.Path(workdir)
  say = print if jax.process_index() == 0 else (lambda *args, **kwargs: None)

  # Mesh: one program for 1 to N devices.
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.space)
  say(
    f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, mesh data={mesh.shape['data']}"
    f" space={mesh.shape['space']}, {jax.process_count()} process(es)"
  )

  # Data: opened, paired and probed before anything slow.
  split = config.data.eval_split
  train_source = input_pipeline.make_source(config.data, config.data.train_split)
  eval_source = input_pipeline.make_source(config.data, split)
  sharding.check_batch(mesh, "batch_size", config.batch_size, config.accumulate_steps)
  loader = input_pipeline.loader_of(config.data)
  say(
    f"data: {len(train_source)} images in {config.data.train_split!r}, {len(eval_source)} in {split!r},"
    f" {len(train_source.classes)} classes, loader {loader}"
    + (", because TensorFlow is not installed" if loader != config.data.loader else "")
  )
  splits = {config.data.train_split: train_source, config.data.eval_split: eval_source}
  for note in dict.fromkeys((*train_source.notes, *eval_source.notes, *inventory.notes(splits))):
    say(f"note: {note}")
  input_pipeline.cache.check_room(config.data.cache, (train_source, eval_source))
  say(scan.probe(train_source, border=config.loss.border_weight > 0, most_bad=config.data.max_bad_examples))

  # Model and optimiser: shapes inferred abstractly, and where their arrays live.
  graphdef, optimizer, schedule, init = build(config, len(train_source.classes))
  state_sharding = sharding.of_state(mesh, jax.eval_shape(init), config.shard_state)
  abstract = with_sharding(jax.eval_shape(init), state_sharding)
  window = crop_window(config, graphdef, abstract)
  say("\n".join(input_pipeline.describe_canvases(train_source, eval_source, config.data, window, config.batch_size)))
  say(f"parameters of {config.model.name}:\n{report.parameter_table(abstract.params, abstract.batch_stats)}")
  check_loss(config)
  check_batch_norm(config, graphdef, abstract)
  validation = Validation(config, evaluate.make_evaluator(config, eval_source, graphdef, mesh), say)

  # The workdir: new, or of a run with the same config. Nothing is written before this point.
  with (
    named_failures(workdir),
    claim_workdir(config, workdir, say) as lock,
    open_checkpoints(workdir, config.keep_checkpoints, say) as checkpoints,
    distributed.StopSignal() as stop,
    report.Profiler(workdir, config.profile_steps) as profiler,
  ):
    if jax.process_index() == 0:
      task.of_split(eval_source, config.data).save(workdir)
    bad = BadExamples(workdir, config.data.max_bad_examples, jax.process_index())
    distributed.on_first(lambda: check_examples(config, splits, workdir, bad))
    class_weights = make_class_weights(config, train_source, workdir)
    # Start: 1. resume from the workdir, else 2. from the weights of init.path, else 3. from scratch.
    start = checkpoints.latest_step() or 0
    unscored = validation.pending(start, checkpoints)
    if start >= config.num_steps and not unscored:
      say(
        f"{workdir}: this run is complete ({start} of {config.num_steps} steps, best {config.policy.metric}"
        f" {_percent(checkpoints.best_score())}).\n  to continue:   raise --config.num_steps\n  to start anew: give"
        f" another --workdir\n  to score it:   python -m segjax.main --mode=eval --workdir={workdir}"
      )
      return {}
    if start:
      state = checkpoints.restore(abstract, start)
      say(f"init: resumed {workdir} at step {start}")
    else:
      loaded = warm_start.load(config.init) if config.init.path else None
      state = materialize(init, state_sharding)
      state = with_weights(state, loaded, config.init.exclude, mesh, say)
    validation.begin(state, checkpoints)
    if validation.stops(state):
      say("this run stopped early. To continue: raise --config.policy.early_stop, or set it to 0")
      return {}

    # The step, and its batches from `start` on.
    train_step = make_step(config, graphdef, optimizer, mesh, state_sharding, class_weights)
    batches = input_pipeline.train_batches(
      train_source,
      config.data,
      seed=config.seed,
      batch_size=config.batch_size,
      rows=sharding.local_rows(mesh, config.batch_size),
      start_step=start,
      num_steps=config.num_steps,
      border=config.loss.border_weight > 0,
      bad=bad,
      window=window,
    )
    batches = sharding.to_device(batches, mesh)

    tensorboard = loader != "grain" and report.has_tensorboard() and jax.process_index() == 0
    if loader == "grain":
      say("TensorBoard is off: it would import TensorFlow, which the grain loader avoids. Curves are in metrics.jsonl.")
    elif not tensorboard:
      say("TensorBoard is off: it needs pip install 'segjax[tensorflow]'. Curves are in metrics.jsonl.")
    writer = report.Writer(workdir, start_step=start, tensorboard=tensorboard, unscored=unscored)
    if before := bad.count(start):
      say(f"note: {before} bad examples before (bad_examples_*.jsonl); data.max_bad_examples = {bad.most}")
    say("compiling the evaluation ...", flush=True)
    validation.compile(abstract)
    progress = report.Progress(start, config.num_steps, config.batch_size)
    say(f"training from step {start} to {config.num_steps}; the first step compiles ...", flush=True)

    step, recent = start, []
    while True:
      if validation.pending(step, checkpoints):  # Also where a run before this one ended in it.
        scores = validation(state, checkpoints, writer)
        progress.restart(step)
        if validation.stops(state):
          say(f"stopped early: no gain in {split}/{config.policy.metric} over {config.policy.early_stop} evaluations")
          break
      if step >= config.num_steps:
        break
      step += 1
      if stop.requested(step):
        # Here, not after a step, so that whatever is due at a step (evaluation) has been done when the run stops at it.
        check_finite(config, state, schedule, train_source, checkpoints, bad, window)
        lock.check()
        checkpoints.save(state)
        checkpoints.wait()
        say(
          f"{stop.name}: stopped after step {step - 1} of {config.num_steps}, checkpoint saved. The same command goes on"
          f" from there (exit code {distributed.PREEMPTED})",
          flush=True,
        )
        raise distributed.Preempted
      # Else the host, which never waits for a step, has batch after batch queued in the devices' memory.
      jax.block_until_ready(recent[-steps.IN_FLIGHT : 1 - steps.IN_FLIGHT])
      with profiler.step(step):
        state, step_metrics = train_step(state, progress.wait(batches))
      if profiler.after(step, step_metrics):
        say(f"profile of the steps {config.profile_steps[0]} to {step}: {workdir / 'profile'}", flush=True)
      recent.append(step_metrics)  # Stays on the device: the host waits for it at log steps only.
      checkpoint_due = validation.due(step) or step % config.checkpoint_every == 0

      if step % config.log_every == 0 or checkpoint_due:
        means = {f"train/{k}": float(np.mean([m[k] for m in jax.device_get(recent)])) for k in step_metrics}
        recent.clear()
        check_finite(config, state, schedule, train_source, checkpoints, bad, window)
        rates, left = progress.lap(step)
        lr = float(schedule(step - 1)) * float(optimizer_lib.plateau_scale(state.policy))
        counted = {"train/bad_examples": bad.count(step)} if bad.most else {}
        writer.scalars(step, means | rates | counted | {"train/learning_rate": lr})
        say(
          f"step {step:>6}/{config.num_steps}  loss {means['train/loss']:.4f}  lr {lr:.2e}"
          f"  {rates['train/images_per_s']:.1f} images/s  data wait {100 * rates['train/data_wait_share']:.0f} %"
          f"  ETA {left}" + "".join(f"  bad examples {count}" for count in counted.values() if count),
          flush=True,
        )
      elif step == start + 1:
        jax.block_until_ready(step_metrics)
        say(f"compiled after {progress.seconds():.0f} s, loss {float(step_metrics['loss']):.4f}", flush=True)
        progress.restart(step)  # Compilation would spoil images/s and ETA.

      if checkpoint_due:
        lock.check()
        checkpoints.save(state)
        progress.restart(step)

    say(
      f"done: {split} mean IoU {_percent(scores[f'{split}/mean_iou'])}, best {config.policy.metric}"
      f" {_percent(checkpoints.best_score())} at step {checkpoints.best_step()}\n"
      f"  checkpoints  {checkpoints.folder}\n  curves       {workdir / 'metrics.jsonl'}"
      + (f" (or: tensorboard --logdir {workdir})" if tensorboard else "")
      + f"\n  pictures     {workdir / 'overlays'}  (image | label | prediction)"
      + f"\nto use it: python -m segjax.predict --workdir={workdir} IMAGES --out=DIR",
      flush=True,
    )
  return scores


def _percent(share: float | None) -> str:
  return "-" if share is None else f"{100 * share:.2f} %"


def make_step(config, graphdef, optimizer, mesh, state_sharding: TrainState, class_weights: np.ndarray | None):
  """The train step that a config describes; see `steps.make_train_step`.

  Args:
    graphdef, optimizer: of `state.build`.
    state_sharding: of `sharding.of_state`.
    class_weights: of `make_class_weights`.
  """
  return steps.make_train_step(
    graphdef,
    optimizer,
    mesh,
    state_sharding=state_sharding,
    seed=config.seed,
    crop_size=config.crop_size,
    augmentation=dict(config.augment),
    loss=losses.make_loss(
      ignore_label=IGNORE_LABEL,
      terms=config.loss.terms,
      class_weights=class_weights,
      hard_fraction=config.loss.hard_fraction,
      hard_fraction_steps=config.loss.hard_fraction_steps,
      focal_gamma=config.loss.focal_gamma,
      border_weight=config.loss.border_weight,
    ),
    auxiliary_weight=config.loss.auxiliary_weight,
    ema_decay=config.optimizer.ema_decay,
    accumulate_steps=config.accumulate_steps,
    kernels=config.kernels,
  )


def crop_window(config, graphdef, state: TrainState):
  """`augment.crop_window` of a config.

  Args:
    graphdef: of `state.build`. state: it, or its shapes.
  """
  return augment.crop_window(config.crop_size, steps.merge(graphdef, state.variables()).border, **config.augment)


def check_loss(config) -> None:
  """Raises ConfigError where `loss.terms` names no loss, or one that does not fit the head."""
  try:
    losses.check_terms(config.loss.terms, config.head == "sigmoid")
  except ValueError as error:
    raise ConfigError(f"config.loss.terms = {tuple(config.loss.terms)}: {error}") from error


def check_batch_norm(config, graphdef, abstract: TrainState) -> None:
  """Raises ConfigError where a batch norm would see one value of each channel of a batch, or of each of its parts.

  That is what the ASPP's image pooling leaves of one image, or a network of one smaller than its crop's stride. It sees
  the whole part whatever the mesh, so the forward pass is traced for parts of one image alone.
  """
  if config.batch_size > config.accumulate_steps:
    return

  def forward(variables, image):
    model = steps.merge(graphdef, variables)
    return model(model.preprocess(image), train=True)

  try:
    jax.eval_shape(forward, abstract.variables(), jax.ShapeDtypeStruct((1, *config.crop_size, 3), jnp.float32))
  except layers.NoVariance as error:
    options = dict(frozen_bn=True, image_pooling=False, batch_norm=False)  # Of some of the models each.
    remedies = [f"model.{k} = {v}" for k, v in options.items() if k in config.model and config.model[k] != v]
    raise ConfigError(
      f"config.batch_size = {config.batch_size} with accumulate_steps = {config.accumulate_steps} is one image at a time:"
      f" {error} Make batch_size at least {2 * config.accumulate_steps}, or set {' or '.join(remedies)}."
    ) from error


def with_weights(state: TrainState, loaded, exclude: tuple[str, ...], mesh, say) -> TrainState:
  """The state with the weights of `warm_start.load`, or as it is where there are none.

  Raises:
    ConfigError: weights that do not fit and are not in `exclude`.
  """
  if loaded is None:
    say("init: scratch")
    return state
  own = state.variables()
  variables, report_line = warm_start.merge(jax.device_get(sharding.gather(own, mesh)), loaded, exclude)
  say(report_line)
  variables = jax.device_put(variables, jax.tree.map(lambda x: x.sharding, own))
  state.params, state.batch_stats = variables["params"], variables["batch_stats"]
  if state.ema is not None:
    state.ema = jax.tree.map(jnp.copy, variables)
  return state


def make_class_weights(config, source, workdir: pathlib.Path) -> np.ndarray | None:
  """[K] float32 or None, from `config.loss.class_weights`; statistics of the labels are cached in the workdir.

  Raises:
    ConfigError: another number of weights than classes, or a class that never occurs.
  """
  weights = config.loss.class_weights
  if not weights:
    return None
  if not isinstance(weights[0], str):
    if len(weights) != len(source.classes):
      raise ConfigError(f"loss.class_weights has {len(weights)} numbers for {len(source.classes)} classes.")
    return np.asarray(weights, np.float32)
  pixels, images_with_class = map(np.asarray, distributed.on_first(lambda: _label_statistics(source, workdir)))
  try:
    return losses.class_weights(weights[0], pixels, images_with_class)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _label_statistics(source, workdir: pathlib.Path) -> tuple[list[int], list[int]]:
  cache = workdir / "label_statistics.json"
  if cache.exists():
    try:
      saved = json.loads(cache.read_text())
      return list(saved["pixels"]), list(saved["images_with_class"])
    except (ValueError, KeyError, TypeError) as error:
      raise ConfigError(f"{cache}: damaged ({error}). Remove it: it is made again from the labels.") from error
  pixels, images_with_class = (counts.tolist() for counts in scan.label_statistics(source))
  atomic.write_text(cache, json.dumps(dict(pixels=pixels, images_with_class=images_with_class)))
  return pixels, images_with_class


def check_finite(
  config, state: TrainState, schedule, source, checkpoints: Checkpoints, bad: BadExamples, window
) -> None:
  """Stops a diverged run; its state still is the one before the failing step. Saves the batch of that step.

  Raises:
    NonFiniteLoss: names step, learning rate, example ids, the batch's file, the last good checkpoint and remedies.
  """
  failed = int(state.failed_step)
  if failed < 0:
    return
  ids = order.train_ids(config.seed, failed, config.batch_size, len(source))
  checkpoints.wait()
  # The others wait: the end of one of them would end process 0 while it writes.
  batch = distributed.on_first(lambda: save_batch(config, failed, source, checkpoints.folder.parent, bad, window))
  raise NonFiniteLoss(
    f"Loss or gradient not finite in step {failed + 1} (learning rate {float(schedule(failed)):.3g}, example ids"
    f" {ids.tolist()}). {batch} Last good checkpoint: step {checkpoints.latest_step()} in {checkpoints.folder}. Lower"
    " optimizer.base_lr, add optimizer.warmup_steps or clip_norm, or look at these examples (segjax.check_data)."
  )


def save_batch(config, step: int, source, workdir: pathlib.Path, bad: BadExamples, window) -> str:
  """Writes the whole batch of a step, as the host reads it, to `workdir`/failed_step_N.npz (N from 1).

  Returns:
    A sentence that says where it is and how to load it, or why there is none.
  """
  path = workdir / f"failed_step_{step + 1}.npz"
  batches = input_pipeline.train_batches(
    source,
    config.data,
    seed=config.seed,
    batch_size=config.batch_size,
    rows=np.arange(config.batch_size),
    start_step=step,
    num_steps=step + 1,
    border=config.loss.border_weight > 0,
    bad=bad,
    window=window,
  )
  try:
    np.savez_compressed(path, **next(batches))
  except (input_pipeline.DataError, OSError) as error:  # The reason to stop is another one.
    return f"Its batch could not be saved ({error})."
  return f'Its batch, before augmentation: batch = dict(numpy.load("{path}")).'


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("main --config=FILE --workdir=RUN")
