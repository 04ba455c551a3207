"""The steps of an experiment, compiled and not run: their memory, work and communication as the compiler tells them."""

import dataclasses
import functools
import time

import jax
import numpy as np
from jax.sharding import Mesh

from segjax.experiment import Experiment
from segjax.tools import costs, flops, hlo, targets


@dataclasses.dataclass
class Program:
  """A compiled step; bytes are those of one device.

  Attributes:
    compiled: to be called with arrays in the shardings of the abstract arguments.
    platform: that it is for: "cpu", "gpu", "tpu".
    arguments, outputs, temporary: bytes, outputs without what is written over arguments.
    multiply_adds: of the whole batch, on all devices; of a train step, backward pass included.
    collectives: {kind: [bytes, ...]}, see `hlo.collectives`.
    seconds: that tracing, lowering and compilation took.
  """

  compiled: jax.stages.Compiled
  platform: str
  arguments: int
  outputs: int
  temporary: int
  multiply_adds: int
  collectives: dict[str, list[int]]
  seconds: float

  @property
  def peak(self) -> int:
    """All that it holds at once, at most."""
    return self.arguments + self.outputs + self.temporary

  @functools.cached_property
  def costs(self) -> list[costs.Cost]:
    """Of each operation, on one device."""
    return costs.costs(self.compiled.as_text(), on_chip=self.platform == "tpu")


def compile_step(step, *arguments, plain=None, mesh: Mesh | None = None) -> Program:
  """Compiles a jitted step for abstract arguments that have shardings.

  Args:
    plain: the same step with plain kernels, whose multiply-adds are those of the papers; None: `step` has these.
    mesh: of the step, whose devices need not be there; None: those of this machine.
  """
  begin = time.perf_counter()
  options = targets.compiler_options(mesh) if mesh else {}
  compiled = step.lower(*arguments).compile(compiler_options=options or None)
  seconds = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  return Program(
    compiled=compiled,
    platform=mesh.devices.flat[0].platform if mesh else jax.default_backend(),
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    multiply_adds=flops.multiply_adds(plain or step, *arguments),
    collectives=hlo.collectives(compiled.as_text()),
    seconds=seconds,
  )


def compile_train(experiment: Experiment, canvas: tuple[int, int], cut: bool = False) -> Program:
  """The train step: compiled(state, batch), for images on a canvas (H, W).

  Args:
    cut: whether larger images are cut to it.

  Raises:
    ConfigError: what `Experiment.check` and its model raise.
  """
  experiment.check()
  weighted = bool(experiment.config.loss.class_weights)
  weights = np.ones(experiment.num_classes, np.float32) if weighted else None  # Any will do.
  step, plain = (experiment.make_train_step(weights, kernels=k) for k in (experiment.config.kernels, "plain"))
  return compile_step(step, *experiment.abstract_train_arguments(canvas, cut), plain=plain, mesh=experiment.mesh)


def compile_eval(experiment: Experiment, canvas: tuple[int, int], batch_size: int | None = None) -> Program:
  """The eval step: compiled(variables, batch), all variables on every device; otherwise as `compile_train`.

  Args:
    batch_size: in place of the config's.
  """
  arguments, plain = experiment.abstract_eval_arguments(canvas, batch_size), experiment.make_eval_step(kernels="plain")
  return compile_step(experiment.eval_step, *arguments, plain=plain, mesh=experiment.mesh)


COMPILE = {"train": compile_train, "eval": compile_eval}
