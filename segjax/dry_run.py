"""What a config needs of its devices, found by compiling its steps and running none."""

import dataclasses
import math
import os
import time

import jax
import numpy as np

from segjax import evaluate, flops, hlo, input_pipeline, report, sharding
from segjax.state import build, with_sharding
from segjax.train import make_step

AHEAD = 2  # Batches that `sharding.to_device` keeps on the device beside the one in use.


@dataclasses.dataclass
class Program:
  """A compiled step; bytes are those of one device.

  Attributes:
    arguments, outputs, temporary: bytes, outputs without what is written over arguments.
    multiply_adds: of the whole batch, on all devices.
    collectives: {kind: [bytes, ...]}, see `hlo.collectives`.
    seconds: that compilation took.
  """

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


def compile_step(step, *arguments) -> Program:
  """Compiles a jitted step for abstract arguments that have shardings."""
  begin = time.perf_counter()
  compiled = step.lower(*arguments).compile()
  seconds = time.perf_counter() - begin
  memory = compiled.memory_analysis()
  return Program(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    multiply_adds=flops.multiply_adds(step, *arguments),
    collectives=hlo.collectives(compiled.as_text()),
    seconds=seconds,
  )


def abstract_batch(mesh, batch_size: int, canvas: tuple[int, int], border: bool = False) -> dict:
  """The shapes of a global batch on its canvas, see `input_pipeline`."""
  shapes = dict(image=((*canvas, 3), np.uint8), label=(canvas, np.uint8), size=((2,), np.int32), id=((), np.int32))
  shapes |= dict(border=(canvas, np.float16)) if border else {}
  return {
    name: jax.ShapeDtypeStruct(
      (batch_size, *shape), dtype, sharding=sharding.batch_sharding(mesh)
    )
    for name, (shape, dtype) in shapes.items()
  }  # fmt: skip


def bytes_per_device(tree) -> int:
  """Of abstract arrays that have shardings."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def device_memory(device) -> tuple[int, str]:
  """Bytes that a device has, and what they are."""
  stats = device.memory_stats()
  if stats is not None:
    return stats["bytes_limit"], f"memory of {device.device_kind} that JAX may use"
  count = jax.local_device_count()
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count, (
    "host memory" if count == 1 else f"host memory, which {count} devices share"
  )


def dry_run(config, workdir=None) -> dict[str, Program]:
  """--mode=dry_run: prints size, work, memory and communication of the train and evaluation steps, and stops.

  Works without the data set where the config says, or the data set is known to have, the number of classes and the canvas.

  Args:
    workdir: is not touched.

  Returns:
    {"train": ..., "evaluation": ...}.

  Raises:
    ConfigError: mesh or model do not fit, or the data set is absent and its classes or canvas unknown.
  """
  say = print if jax.process_index() == 0 else (lambda *args, **kwargs: None)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.space)
  device = mesh.local_devices[0]
  data, (batch_size, eval_size) = config.data, (config.batch_size, config.eval.batch_size)
  num_classes, canvas, note = input_pipeline.facts(data, data.train_split)
  _, eval_canvas, _ = input_pipeline.facts(data, data.eval_split)
  sharding.check_batch(mesh, "batch_size", batch_size, config.accumulate_steps)
  sharding.check_batch(mesh, "eval.batch_size", eval_size)
  say(
    f"dry run: {mesh.size} x {device.device_kind}, mesh data={mesh.shape['data']} space={mesh.shape['space']},"
    f" {jax.process_count()} process(es); nothing is trained or written\n"
    f"data: {note}\n  {num_classes} classes, canvas {canvas[0]}x{canvas[1]} in training, {eval_canvas[0]}x{eval_canvas[1]}"
    f" in evaluation\noptions: dtype={config.dtype}, shard_state={config.shard_state}, remat={config.remat},"
    f" accumulate_steps={config.accumulate_steps}"
  )

  graphdef, optimizer, _, init = build(config, num_classes)
  abstract = jax.eval_shape(init)
  state_sharding = sharding.of_state(mesh, abstract, config.shard_state)
  state = with_sharding(abstract, state_sharding)
  variables = with_sharding(abstract.eval_variables(), sharding.replicated(mesh))
  of_params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract.params))
  at_rest = bytes_per_device(state)
  say(
    f"parameters of {config.model.name}:\n{report.parameter_table(abstract.params, abstract.batch_stats)}\n"
    f"  {mib(of_params)}; with averages and optimiser state {mib(at_rest)} on each device",
    flush=True,
  )

  # Of their numbers, class weights only have to be there.
  class_weights = np.ones(num_classes, np.float32) if config.loss.class_weights else None
  train_step = make_step(config, graphdef, optimizer, mesh, state_sharding, class_weights)
  eval_step = evaluate.make_step(config, graphdef, mesh, num_classes)
  batch = abstract_batch(mesh, batch_size, canvas, config.loss.border_weight > 0)
  programs = {}
  for name, step, arguments in (
    ("train", train_step, (state, batch)),
    ("evaluation", eval_step, (variables, abstract_batch(mesh, eval_size, eval_canvas))),
  ):
    program = programs[name] = compile_step(step, *arguments)
    found = {kind: sizes for kind, sizes in program.collectives.items() if sizes}
    communication = ", ".join(f"{len(sizes)} {kind} ({mib(sum(sizes))})" for kind, sizes in found.items())
    say(
      f"{name} step, {batch_size if name == 'train' else eval_size} images (compiled in {program.seconds:.0f} s)\n"
      f"  multiply-adds          {program.multiply_adds / 1e9:12,.1f} billion{', backward included' * (name == 'train')}\n"
      f"  arguments              {mib(program.arguments):>16}   per device\n"
      f"  results                {mib(program.outputs):>16}\n"
      f"  temporary              {mib(program.temporary):>16}\n"
      f"  in all, at most        {mib(program.peak):>16}\n"
      f"  collectives            {communication or 'none'}",
      flush=True,
    )

  # During an evaluation the rest of the state stays where it is; with shard_state, all of it.
  beside = at_rest - (0 if config.shard_state else bytes_per_device(variables))
  needed = max(programs["train"].peak + AHEAD * bytes_per_device(batch), programs["evaluation"].peak + beside)
  available, meaning = device_memory(device)
  verdict = "fits" if needed <= available else (
    "DOES NOT FIT. Set remat=True, a larger accumulate_steps or a smaller batch_size, dtype=bfloat16; on several devices"
    " shard_state=True, or mesh.space above 1"
  )  # fmt: skip
  say(f"training with evaluation needs at most {mib(needed)} of {mib(available)} ({meaning}): {verdict}", flush=True)
  return programs


def mib(size: int) -> str:
  """Bytes as '1,234.5 MiB'."""
  return f"{size / 2**20:,.1f} MiB"
