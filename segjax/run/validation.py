"""The evaluations of a run in progress: when they are due, their checkpoints, and the policies that act on the scores.

A checkpoint is saved before its evaluation, and its score recorded after it. So a checkpoint holds the policies' memory of
the evaluations before it; the one at its own step is counted when it is restored, or repeated where it was cut short.
"""

import contextlib
import functools
import json
import math
import zlib
from collections.abc import Iterator

import jax

from segjax import config as config_lib
from segjax import metrics, sharding
from segjax import optimizer as optimizer_lib
from segjax.config import ConfigError, suggest
from segjax.input_pipeline import DataError
from segjax.run import record, report
from segjax.run.checkpoint import Checkpoints, Score
from segjax.run.evaluation import Evaluator
from segjax.state import TrainState


class Validation:
  """Evaluates the saved states of a run.

  Args:
    evaluator: of the run.
    say: prints a line for people.

  Raises:
    ConfigError: no evaluation gives `policy.metric`; lists those that there are.
  """

  def __init__(self, config, evaluator: Evaluator, say):
    p = config.policy
    classes = evaluator.source.classes
    known = report.score_scalars("", classes, metrics.Totals(len(classes)))
    known = [name.removeprefix("/") for name in known if name != "/calibration_error"]  # Of which less is better.
    if p.metric not in known:
      raise ConfigError(
        f"config.policy.metric = {p.metric!r}: choose one of {', '.join(known)}.{suggest(p.metric, known)}"
      )
    self._config, self._evaluator, self._say, self._mesh = config, evaluator, say, evaluator.mesh
    self._metric = f"{config.data.eval_split}/{p.metric}"
    self._measure = measure(config)
    # Patience counts evaluations, so how often they are belongs to it. An int32, as arrays hold it.
    self._regime = zlib.crc32(json.dumps([self._measure, config.eval_every]).encode()) >> 1
    remember = functools.partial(
      optimizer_lib.update_policy,
      min_gain=p.min_gain,
      plateau_factor=p.plateau_factor,
      plateau_patience=p.plateau_patience,
    )
    self._remember = jax.jit(remember, out_shardings=sharding.replicated(self._mesh))

  def pending(self, step: int, checkpoints: Checkpoints) -> bool:
    """Whether the state after `step` steps is to be evaluated, and was not."""
    return self.due(step) and checkpoints.score(step) is None

  def due(self, step: int) -> bool:
    """Whether a run without interruptions evaluates the state after `step` steps."""
    return step > 0 and (step == self._config.num_steps or step % self._config.eval_every == 0)

  def stops(self, state: TrainState) -> bool:
    """Whether `policy.early_stop` evaluations in a row brought no gain."""
    return 0 < self._config.policy.early_stop <= int(state.policy["stale"])

  def begin(self, state: TrainState, checkpoints: Checkpoints) -> None:
    """Brings the policies' memory up to a state that was just made or restored.

    It is reset where its scores cannot be compared with those to come; the learning rate stays scaled as it is.
    """
    step, policy = int(state.step), self._config.policy
    score, regime = checkpoints.score(step), int(state.policy["regime"])
    if score is not None and score.regime == regime and (self.due(step) or regime != self._regime):
      state.policy = self._remember(state.policy, score.value)
    if regime != self._regime:
      scale = float(optimizer_lib.plateau_scale(state.policy))
      if step and (policy.plateau_factor < 1 or policy.early_stop):
        self._say(
          "note: eval_every, data.eval_split or eval.* are not those of the evaluations so far: plateau and early stopping"
          f" count again from step {step}, the learning rate stays at {scale:g} times the schedule's"
        )
      state.policy = sharding.gather(optimizer_lib.init_policy(self._regime, scale), self._mesh)
      if score is not None and score.regime == self._regime:  # Repeated by a run that then died.
        state.policy = self._remember(state.policy, score.value)
    if self.pending(step, checkpoints):
      self._say(
        f"note: the evaluation at step {step} failed or was cut short before; it comes first, from the checkpoint"
      )
    best = checkpoints.best_step()
    if best is not None and checkpoints.score(best).measure != self._measure:
      self._say(
        f"note: the best so far, step {best}, was measured otherwise ({_changes(checkpoints.score(best), self._measure)}):"
        " it is not compared with what comes, and the first new score takes its place"
      )

  def compile(self, abstract: TrainState) -> None:
    """Compiles the evaluation before training begins, so that its failure costs nothing."""
    self._say("compiling the evaluation ...")
    self._evaluator.compile(abstract.eval_variables())

  def __call__(self, state: TrainState, checkpoints: Checkpoints, writer: report.Writer) -> dict[str, float]:
    """Evaluates a state that `checkpoints` has or is about to have, and updates its policies.

    Returns:
      The scores, e.g. {"val/mean_iou": ...}.
    """
    step = int(state.step)
    checkpoints.wait()  # So that a failure here loses no training.
    with self._advice(step):
      evaluation = self._evaluator(sharding.gather(state.eval_variables(), self._mesh))
    record.write(writer, step, evaluation)
    self._say(f"{self._config.data.eval_split} at step {step}:\n{evaluation.table}", flush=True)
    score = Score(float(evaluation.scalars[self._metric]), self._measure, self._regime)
    if math.isnan(score.value):
      self._say(f"note: {self._metric} has no value here, which counts as no gain, and never as best", flush=True)
    checkpoints.record(step, score)
    state.policy = self._remember(state.policy, score.value)
    writer.page()  # Last: a run that is killed here need not evaluate again.
    return evaluation.scalars

  @contextlib.contextmanager
  def _advice(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      advice = (
        f"So the evaluation of {self._config.data.eval_split!r} at step {step} failed. Nothing is lost: the checkpoint of"
        f" step {step} is complete, and the same command evaluates it again and goes on. If memory ran out, lower"
        " eval.batch_size or set eval.window; to train on without this evaluation, change eval_every (num_steps, if this is"
        " the last)."
      )
      if isinstance(error, DataError):
        raise DataError(f"{error}\n{advice}") from error
      error.add_note(advice)
      raise


def measure(config) -> dict:
  """What a score depends on beside the weights, as JSON has it: only scores of one measure can be compared."""
  none = ("eval.batch_size", "eval.checkpoint", "eval.num_overlays")
  fields = {name: value for name, value in config_lib.fields(config.eval, "eval.").items() if name not in none}
  return json.loads(json.dumps({"data.eval_split": config.data.eval_split} | fields))


def _changes(score: Score, measure: dict) -> str:
  before = score.measure or {}
  names = sorted(name for name in before.keys() | measure.keys() if before.get(name) != measure.get(name))
  return ", ".join(f"{name}: {before.get(name)!r} -> {measure.get(name)!r}" for name in names)
