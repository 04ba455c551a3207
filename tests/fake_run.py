"""A run whose step only counts and whose evaluations give what a test says, so that nothing is compiled but its state."""

import dataclasses

import jax.numpy as jnp

from segjax import metrics
from segjax.experiment import Experiment
from segjax.run import evaluation, report


class Fake:
  """What a run is made of here, and what happened in it.

  Attributes:
    scores: of the evaluations to come, by mean IoU; an exception is raised.
    events: "compile", ("step", n) and "evaluate" in their order.
    at_step: called with n before step n.
    class_weights: that the step was made with.
  """

  def __init__(self):
    self.scores, self.events, self.at_step, self.class_weights = [], [], lambda n: None, None

  def make_step(self, class_weights=None):
    self.class_weights = class_weights
    return lambda state, batch: self.step(state, batch)  # A test may replace it.

  def step(self, state, batch):
    n = int(state.step) + 1
    self.events.append(("step", n))
    self.at_step(n)
    metrics = dict(loss=jnp.float32(n), grad_norm=jnp.float32(1), pixel_accuracy=jnp.float32(0))
    return dataclasses.replace(state, step=state.step + 1), metrics

  def evaluate(self, evaluator, variables):
    self.events.append("evaluate")
    score = self.scores.pop(0)
    if isinstance(score, BaseException):
      raise score
    split = evaluator.config.data.eval_split
    scalars = {f"{split}/mean_iou": score, f"{split}/iou/disk": score}
    totals = metrics.Totals(len(evaluator.source.classes))
    return evaluation.Evaluation(totals, scalars, "table", {}, [], evaluator.source, evaluator.config)

  def page(self, writer):
    """None: it takes half a second, and nothing was scored."""


def install(monkeypatch) -> Fake:
  """Puts it in the place of the steps and evaluations of every run."""
  made = Fake()
  monkeypatch.setattr(Experiment, "make_train_step", lambda experiment, *weights: made.make_step(*weights))
  monkeypatch.setattr(evaluation.Evaluator, "compile", lambda self, variables: made.events.append("compile"))
  monkeypatch.setattr(evaluation.Evaluator, "__call__", lambda self, variables: made.evaluate(self, variables))
  monkeypatch.setattr(report.Writer, "page", lambda self: made.page(self))
  return made
