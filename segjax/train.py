"""Training, from a config to a scored checkpoint, top to bottom in the order things happen."""

import pathlib

import jax
import numpy as np

from segjax import config as config_lib
from segjax import input_pipeline, sharding, steps
from segjax import optimizer as optimizer_lib
from segjax.experiment import Experiment
from segjax.input_pipeline import order, scan
from segjax.input_pipeline.bad_examples import BadExamples
from segjax.run import distributed, image_statistics, label_balance, prediction_info, report, streams, trackers
from segjax.run.checkpoint import Checkpoints
from segjax.run.examples import check_examples
from segjax.run.report import say
from segjax.run.validation import Validation
from segjax.run.workdir import claim_workdir, named_failures, open_checkpoints
from segjax.state import TrainState


class NonFiniteLoss(RuntimeError):
  """The loss or a gradient became infinite or NaN; the message names the step and what to try."""


@streams.lasting_output()
def train(config, workdir) -> dict[str, float]:
  """Trains and evaluates as `config` says, resuming whatever `workdir` holds.

  Returns:
    The scores of the last evaluation, e.g. {"val/mean_iou": ...}; empty where the run was complete already.

  Raises:
    ConfigError: `workdir` belongs to a run with another config (names the fields), or a tracker, mesh, model, weights or class
      weights do not fit.
    DataError: the data set cannot be used, or an example of the evaluation split, for which see the message.
    NonFiniteLoss: training diverged; the last good checkpoint is kept.
    workdir.WorkdirError: the workdir can no longer be written; its complete checkpoints are kept.
  """
  trackers.check(config.trackers)
  workdir = pathlib.Path(workdir)
  config = image_statistics.resolved(config, workdir, measure=True)
  # Mesh: one program for 1 to N devices.
  experiment = Experiment(config)
  say(f"devices: {report.devices(experiment.mesh)}")
  splits = open_data(experiment)
  validation = build_model(experiment)

  # The workdir: new, or of a run with the same config. Nothing is written before this point.
  with (
    named_failures(workdir),
    claim_workdir(config, workdir, say) as lock,
    open_checkpoints(workdir, config.keep_checkpoints, say) as checkpoints,
    distributed.StopSignal() as stop,
    report.Profiler(workdir, config.profile_steps) as profiler,
    trackers.Trackers(config.trackers, config_lib.fields(config), workdir, say) as tracked,
  ):
    if jax.process_index() == 0:
      prediction_info.of_split(experiment.eval_source, config.data).save(workdir)
    bad = BadExamples(workdir, config.data.max_bad_examples, jax.process_index())
    distributed.on_first(lambda: check_examples(config, splits, workdir, bad))
    class_weights = experiment.class_weights(workdir)
    start = checkpoints.latest_step() or 0
    unscored = validation.pending(start, checkpoints)
    if start >= config.num_steps and not unscored:
      say(report.complete_lines(config, workdir, start, checkpoints.best_score()))
      return {}
    state = resume_or_begin(experiment, workdir, checkpoints, start, bad)
    validation.begin(state, checkpoints)
    if validation.stops(state):
      say("this run stopped early. To continue: raise --config.policy.early_stop, or set it to 0")
      return {}

    # The step, and its batches from `start` on.
    train_step = experiment.checked_train_step(class_weights)
    batches = experiment.device_batches(start, config.num_steps, bad)
    writer = report.Writer(workdir, trackers=tracked, start_step=start, unscored=unscored)
    if before := bad.count(start):
      say(f"note: {before} bad examples before (bad_examples_*.jsonl); data.max_bad_examples = {bad.most}")
    validation.compile(experiment.abstract_state)
    progress = report.Progress(start, config.num_steps, config.batch_size)
    say(f"training from step {start} to {config.num_steps}; the first step compiles ...")

    step, recent = start, []
    while True:
      if validation.pending(step, checkpoints):  # Also where a run before this one ended in it.
        scores = validation(state, checkpoints, writer)
        progress.restart(step)
        if validation.stops(state):
          say(report.stopped_early_line(config))
          break
      if step >= config.num_steps:
        break
      step += 1
      if stop.requested(step):
        # Here, not after a step, so that whatever is due at a step (evaluation) has been done when the run stops at it.
        check_finite(experiment, state, checkpoints, bad)
        save(state, checkpoints, lock)
        checkpoints.wait()
        say(report.preempted_line(stop.name, step - 1, config.num_steps))
        raise distributed.Preempted
      # Else the host, which never waits for a step, has batch after batch queued in the devices' memory.
      jax.block_until_ready(recent[-steps.IN_FLIGHT : 1 - steps.IN_FLIGHT])
      with profiler.step(step):
        state, step_metrics = train_step(state, progress.wait(batches))
      if profiler.after(step, step_metrics):
        say(f"profile of the steps {config.profile_steps[0]} to {step}: {workdir / 'profile'}")
      recent.append(step_metrics)  # Stays on the device: the host waits for it at log steps only.
      checkpoint_due = validation.due(step) or step % config.checkpoint_every == 0

      if step % config.log_every == 0 or checkpoint_due:
        check_finite(experiment, state, checkpoints, bad)
        log(step, recent, experiment, state, bad, progress, writer)
        recent.clear()
      elif step == start + 1:
        jax.block_until_ready(step_metrics)
        say(f"compiled after {progress.seconds():.0f} s, loss {float(step_metrics['loss']):.4f}")
        progress.restart(step)  # Compilation would spoil images/s and ETA.

      if checkpoint_due:
        save(state, checkpoints, lock)
        progress.restart(step)

    mean_iou = scores[f"{config.data.eval_split}/mean_iou"]
    say(report.closing_lines(config, workdir, mean_iou, checkpoints))
  return scores


def open_data(experiment: Experiment) -> dict[str, object]:
  """{split: source} of training and evaluation: opened, paired and probed before anything slow."""
  config, data = experiment.config, experiment.config.data
  splits = {data.train_split: experiment.train_source}
  splits[data.eval_split] = experiment.eval_source
  sharding.check_batch(experiment.mesh, "batch_size", config.batch_size, config.accumulate_steps)
  say(report.data_lines(data, splits))
  kept = [experiment.train_source] * (data.cache != "device") + [experiment.eval_source]
  input_pipeline.cache.check_room(data.cache, kept)
  say(scan.probe(experiment.train_source, border=experiment.weighs_borders, most_bad=data.max_bad_examples))
  if experiment.balance is not None:
    say(label_balance.line(experiment.train_source, experiment.balance))
  return splits


def build_model(experiment: Experiment) -> Validation:
  """Infers the shapes of model and optimiser abstractly, and checks what they are to do."""
  config, state = experiment.config, experiment.abstract_state
  sources = experiment.train_source, experiment.eval_source
  window = experiment.crop_window
  say("\n".join(input_pipeline.describe_canvases(*sources, config.data, window, config.batch_size)))
  say(
    f"parameters of {config.model.name}:\n{report.parameter_table(state.params, state.batch_stats, experiment.frozen)}"
  )
  experiment.check()
  return Validation(config, experiment.evaluator, say)


def resume_or_begin(
  experiment: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints, start: int, bad: BadExamples
) -> TrainState:
  """1. Resumes the run, else 2. begins with the weights of init.path, else 3. from scratch."""
  if start:
    state = checkpoints.restore(experiment.abstract_state, start)
    say(f"init: resumed {workdir} at step {start}")
    return state
  state, line = experiment.first_state(bad)
  say(line)
  return state


def log(
  step: int,
  recent: list[dict],
  experiment: Experiment,
  state: TrainState,
  bad: BadExamples,
  progress: report.Progress,
  writer: report.Writer,
) -> None:
  """Writes and says what the `recent` steps, up to `step`, brought: the means of their metrics, speed and learning rate."""
  recent = jax.device_get(recent)
  means = {f"train/{name}": float(np.mean([metrics[name] for metrics in recent])) for name in recent[0]}
  rates, left = progress.lap(step)
  lr = float(experiment.schedule(step - 1)) * float(optimizer_lib.plateau_scale(state.policy))
  counted = {"train/bad_examples": bad.count(step)} if bad.most else {}
  scalars = means | rates | counted | {"train/learning_rate": lr}
  writer.scalars(step, scalars)
  say(report.progress_line(step, experiment.config.num_steps, scalars, left))


def save(state: TrainState, checkpoints: Checkpoints, lock) -> None:
  """Saves a state if the workdir still is this run's."""
  lock.check()
  checkpoints.save(state)


def check_finite(experiment: Experiment, state: TrainState, checkpoints: Checkpoints, bad: BadExamples) -> None:
  """Stops a diverged run; its state still is the one before the failing step. Saves the batch of that step.

  Raises:
    NonFiniteLoss: names step, learning rate, example ids, the batch's file, the last good checkpoint and remedies.
  """
  failed = int(state.failed_step)
  if failed < 0:
    return
  config = experiment.config
  ids = order.train_ids(config.seed, failed, config.batch_size, len(experiment.train_source), experiment.balance)
  checkpoints.wait()
  # The others wait: the end of one of them would end process 0 while it writes.
  batch = distributed.on_first(lambda: save_batch(experiment, failed, checkpoints.folder.parent, bad))
  raise NonFiniteLoss(
    f"Loss or gradient not finite in step {failed + 1} (learning rate {float(experiment.schedule(failed)):.3g}, example"
    f" ids {ids.tolist()}). {batch} Last good checkpoint: step {checkpoints.latest_step()} in {checkpoints.folder}. Lower"
    " optimizer.base_lr, add optimizer.warmup_steps or clip_norm, or look at these examples (segjax.check_data)."
  )


def save_batch(experiment: Experiment, step: int, workdir: pathlib.Path, bad: BadExamples) -> str:
  """Writes the whole batch of a step, as the host reads it, to `workdir`/failed_step_N.npz (N from 1).

  Returns:
    A sentence that says where it is and how to load it, or why there is none.
  """
  path = workdir / f"failed_step_{step + 1}.npz"
  rows = np.arange(experiment.config.batch_size)
  batches = experiment.train_batches(step, step + 1, rows=rows, bad=bad)
  try:
    np.savez_compressed(path, **next(batches))
  except (input_pipeline.DataError, OSError) as error:  # The reason to stop is another one.
    return f"Its batch could not be saved ({error})."
  return f'Its batch, before augmentation: batch = dict(numpy.load("{path}")).'


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("main --config=FILE --workdir=RUN")
