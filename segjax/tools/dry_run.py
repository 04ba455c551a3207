"""What a config needs of its devices, found by compiling its steps and running none."""

import os

import jax

from segjax import input_pipeline, sharding, steps
from segjax.experiment import Experiment
from segjax.run import commandline, report
from segjax.run.evaluation import batch_shapes
from segjax.run.report import say
from segjax.tools import programs, roofline, targets
from segjax.tools.programs import Program


def device_memory(device) -> tuple[int, str]:
  """Bytes that a device has, and what they are."""
  if device not in jax.devices():
    memory = targets.facts(device).memory
    if device.platform == "tpu":
      return memory, f"memory of {device.device_kind}"
    return memory * 3 // 4, f"what JAX takes of {device.device_kind}; XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 takes more"
  return sharding.device_memory(device)


def dry_run(
  config, workdir=None, target: str | None = None, figures: str | None = None, loader_speed: float | None = None
) -> dict[str, Program]:
  """--mode=dry_run: prints size, work, memory and communication of the train and evaluation steps, and stops.

  Works without the data set where the config says, or the data set is known to have, the number of classes and the canvas.

  Args:
    workdir: is not touched.
    target: devices to compile for, see `targets.devices`, and to set bytes and flops against; None: those at hand, without.
    loader_speed: images/s that the loaders were measured to give per core, to set against what the devices take.
    figures: file that gets these numbers, a JSON object for each step on a line.

  Returns:
    {"train": ..., "evaluation": ...}.

  Raises:
    ConfigError: mesh, model or target do not fit, or the data set is absent and its classes or canvas unknown.
  """
  data = config.data
  devices = None if target is None else targets.devices(target)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.space, devices=devices)
  num_classes, canvas, note = input_pipeline.classes_and_canvas(data, data.train_split)
  _, eval_canvas, _ = input_pipeline.classes_and_canvas(data, data.eval_split)
  sharding.check_batch(mesh, "batch_size", config.batch_size, config.accumulate_steps)
  sharding.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
  say(
    f"dry run: {report.devices(mesh)}; nothing is trained or written\n"
    f"data: {note}\n  {num_classes} classes, canvas {canvas[0]}x{canvas[1]} in training, {eval_canvas[0]}x{eval_canvas[1]}"
    f" in evaluation\noptions: dtype={config.dtype}, shard_state={config.shard_state}, remat={config.remat},"
    f" accumulate_steps={config.accumulate_steps}"
  )

  experiment = Experiment(config, mesh=mesh, num_classes=num_classes)
  window, whole = experiment.crop_window, canvas
  if window is not None and any(n > m for n, m in zip(whole, window[0])):
    _, canvas, _ = input_pipeline.classes_and_canvas(data, data.train_split, window)
  if canvas != whole:
    say(
      f"larger images are cut to a canvas of {canvas[0]}x{canvas[1]} in training, which {whole[0]}x{whole[1]} would mostly pad"
    )
  say(_parameters(experiment))
  compiled = {"train": programs.compile_train(experiment, canvas, canvas != whole)}
  compiled["evaluation"], eval_canvas, eval_size = _compile_evaluation(experiment, eval_canvas)
  for name, program in compiled.items():
    images = config.batch_size if name == "train" else eval_size
    say(_program(name, program, images))
    if target is not None:
      say(f"{roofline.table(program, mesh.devices.flat[0])}\n{_input(name, program, images, mesh, data, loader_speed)}")
    if figures and not jax.process_index():
      of_step = dict(target=target or targets.HERE, step=name, images=images, dtype=config.dtype, mesh=dict(mesh.shape))
      commandline.append_json(figures, of_step | roofline.row(program, mesh.devices.flat[0]))
  batch = experiment.abstract_train_arguments(canvas, canvas != whole)[1]
  split = sharding.bytes_per_device(batch.pop("split")) if "split" in batch else 0
  if split:
    say(f"data.cache = device: the training split takes {mib(split)} of each device, among the train step's arguments")
  variables, eval_batch = map(sharding.bytes_per_device, experiment.abstract_eval_arguments(eval_canvas, eval_size))
  say(_fit(experiment, compiled, sharding.bytes_per_device(batch), split, variables, eval_batch))
  return compiled


def _input(name: str, program: Program, images: int, mesh, data, loader_speed: float | None) -> str:
  known = targets.facts(mesh.devices.flat[0])
  if name == "train" and data.cache == "device":
    return "  input                from the devices' memory (data.cache = device): the host sends ids"
  if known is None:
    return "  input                not compared: what this device can do is not known (segjax/tools/targets.py)"
  of_host = min(os.cpu_count(), data.workers or os.cpu_count())
  cores = jax.process_count() * of_host if targets.is_here(mesh) else None
  return roofline.input_lines(roofline.rate(program, images, known), loader_speed, cores)


def _parameters(experiment: Experiment) -> str:
  state = experiment.abstract_state
  of_params = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
  return (
    f"parameters of {experiment.config.model.name}:\n{report.parameter_table(state.params, state.batch_stats, experiment.frozen)}\n"
    f"  {mib(of_params)}; with averages and optimiser state {mib(sharding.bytes_per_device(state))} on each device"
  )


def _compile_evaluation(experiment: Experiment, canvas: tuple[int, int]) -> tuple[Program, tuple[int, int], int]:
  """The program that needs most memory, its canvas and its batch; on `canvas` where the data set is not at hand."""
  try:
    shapes = batch_shapes(experiment.config, experiment.eval_source, experiment.mesh)
  except input_pipeline.DataError:
    shapes = [(canvas, experiment.config.eval.batch_size)]
  found = [(programs.compile_eval(experiment, *shape), *shape) for shape in shapes]
  program, canvas, size = max(found, key=lambda of_shape: of_shape[0].peak)
  if len(found) > 1:
    say(f"evaluation has {len(found)} canvases, of which {canvas[0]}x{canvas[1]} needs most memory")
  return program, canvas, size


def _program(name: str, program: Program, images: int) -> str:
  found = {kind: sizes for kind, sizes in program.collectives.items() if sizes}
  communication = ", ".join(f"{len(sizes)} {kind} ({mib(sum(sizes))})" for kind, sizes in found.items())
  return (
    f"{name} step, {images} images (compiled in {program.seconds:.0f} s)\n"
    f"  multiply-adds          {program.multiply_adds / 1e9:12,.1f} billion{', backward included' * (name == 'train')}\n"
    f"  arguments              {mib(program.arguments):>16}   per device\n"
    f"  results                {mib(program.outputs):>16}\n"
    f"  temporary              {mib(program.temporary):>16}\n"
    f"  in all, at most        {mib(program.peak):>16}\n"
    f"  collectives            {communication or 'none'}"
  )


def _fit(
  experiment: Experiment, compiled: dict[str, Program], batch: int, split: int, variables: int, eval_batch: int
) -> str:
  """Whether training with evaluation fits a device; sizes in bytes on each.

  Beside what a step itself holds: batches that were transferred ahead, and those of steps that wait for it.
  """
  mesh, waiting = experiment.mesh, sharding.AHEAD + steps.IN_FLIGHT - 1
  step, evaluation = compiled["train"], compiled["evaluation"]
  # During an evaluation the rest of the state stays where it is (with shard_state, all of it), with the last batch of
  # training, those to come, and the training split; and the results of a step are read while the next is computed.
  at_rest = sharding.bytes_per_device(experiment.abstract_state)
  beside = at_rest - (0 if experiment.config.shard_state else variables) + (1 + sharding.AHEAD) * batch + split
  evaluating = evaluation.peak + evaluation.outputs + waiting * eval_batch + beside
  needed = max(step.peak + waiting * batch, evaluating)
  available, meaning = device_memory(mesh.local_devices[0] if targets.is_here(mesh) else mesh.devices.flat[0])
  verdict = (
    "fits"
    if needed <= available
    else (
      f"DOES NOT FIT. Set {'data.cache=memory or none, ' * bool(split)}remat=True, a larger accumulate_steps or a smaller batch_size, dtype=bfloat16; on several devices"
      " shard_state=True, or mesh.space above 1"
    )
  )
  return f"training with evaluation needs at most {mib(needed)} of {mib(available)} ({meaning}): {verdict}"


def mib(size: int) -> str:
  """Bytes as '1,234.5 MiB'."""
  return f"{size / 2**20:,.1f} MiB"


if __name__ == "__main__":
  commandline.refuse("main --mode=dry_run --config=FILE")
