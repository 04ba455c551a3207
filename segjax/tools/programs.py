"""The steps of a config, compiled and not run: their memory, work and communication as the compiler tells them."""

import dataclasses
import time

import jax
import numpy as np

from segjax import evaluate, sharding, state, train
from segjax.steps import abstract_batch
from segjax.tools import flops, hlo


@dataclasses.dataclass
class Program:
  """A compiled step; bytes are those of one device.

  Attributes:
    compiled: to be called with arrays in the shardings of `train` or `eval`'s abstract arguments.
    arguments, outputs, temporary: bytes, outputs without what is written over arguments.
    multiply_adds: of the whole batch, on all devices; of a train step, backward pass included.
    collectives: {kind: [bytes, ...]}, see `hlo.collectives`.
    seconds: that tracing, lowering and compilation took.
  """

  compiled: jax.stages.Compiled
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


def compile_step(step, *arguments, plain=None) -> Program:
  """Compiles a jitted step for abstract arguments that have shardings.

  Args:
    plain: the same step with plain kernels, whose multiply-adds are those of the papers; None: `step` has these.
  """
  begin = time.perf_counter()
  compiled = step.lower(*arguments).compile()
  seconds = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  return Program(
    compiled=compiled,
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    multiply_adds=flops.multiply_adds(plain or step, *arguments),
    collectives=hlo.collectives(compiled.as_text()),
    seconds=seconds,
  )


def compile_train(config, mesh, num_classes: int, canvas: tuple[int, int], cut: bool = False) -> Program:
  """The train step of a config: compiled(state, batch), on a mesh, for images on a canvas (H, W).

  Args:
    cut: whether larger images are cut to it.

  Raises:
    ConfigError: what `state.build` and `train.check_batch_norm` raise.
  """
  graphdef, optimizer, _, init = state.build(config, num_classes)
  abstract = jax.eval_shape(init)
  train.check_batch_norm(config, graphdef, abstract)
  placed = sharding.of_state(mesh, abstract, config.shard_state)
  weights = np.ones(num_classes, np.float32) if config.loss.class_weights else None  # They only have to be there.
  step, plain = (
    train.make_step(c, graphdef, optimizer, mesh, placed, weights) for c in (config, with_plain_kernels(config))
  )
  batch = abstract_batch(mesh, config.batch_size, canvas, config.loss.border_weight > 0, cut)
  return compile_step(step, state.with_sharding(abstract, placed), batch, plain=plain)


def compile_eval(config, mesh, num_classes: int, canvas: tuple[int, int]) -> Program:
  """The eval step of a config: compiled(variables, batch), all variables on every device; otherwise as `compile_train`."""
  graphdef, _, _, init = state.build(config, num_classes)
  variables = state.with_sharding(jax.eval_shape(init).eval_variables(), sharding.replicated(mesh))
  batch = abstract_batch(mesh, config.eval.batch_size, canvas)
  step, plain = (evaluate.make_step(c, graphdef, mesh, num_classes) for c in (config, with_plain_kernels(config)))
  return compile_step(step, variables, batch, plain=plain)


def with_plain_kernels(config):
  """A copy of the config."""
  config = config.copy_and_resolve_references()
  config.kernels = "plain"
  return config


COMPILE = {"train": compile_train, "eval": compile_eval}
