"""How fast the compiled steps are: the train and eval part of segjax.benchmark, alone or in turn with PyTorch."""

import contextlib
import dataclasses
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from segjax import inference, input_pipeline, sharding, steps
from segjax.experiment import Experiment
from segjax.input_pipeline import images as images_lib
from segjax.tools import flops, programs, torch_process

TRAINING = 3  # A backward pass costs about two forward passes, so a step of training counts as three.
ROUNDS = 4  # Of measurements in turn.


@dataclasses.dataclass
class Measured:
  """A compiled step with its arguments on the devices; `run()` runs it once, to its end.

  Attributes:
    size: (H, W) of the images that the network sees. batch_size: of all devices.
    program: the compiled step, with its memory and work.
    forward: multiply-adds of its forward passes, all devices.
    run, wait_share: `wait_share(seconds)` runs on the config's data for that long, and gives the share of the time that
      was spent waiting for it; None without data.
  """

  size: tuple[int, int]
  batch_size: int
  program: programs.Program
  forward: int
  run: Callable[[], None]
  wait_share: Callable[[float], float] | None


def of_train(config, mesh) -> Measured:
  """The train step of a config. Where its data is at hand, on the first batch of it, else on noise.

  Raises:
    ConfigError, DataError: what training raises.
  """
  experiment, at_hand = Experiment(config, mesh=mesh), _at_hand(config.data)

  def batches():
    return experiment.device_batches(0, 1 << 30)

  batch = next(batches()) if at_hand else _noise(experiment, config.batch_size, experiment.weighs_borders)
  images = (batch["split"] if "split" in batch else batch)["image"]
  program = programs.compile_train(experiment, images.shape[1:3], "origin" in batch)
  holder = [experiment.init_state()]  # The state is donated, so each call takes the last one's.

  def run(batch=batch):
    holder[0], metrics = program.compiled(holder[0], batch)
    jax.block_until_ready(metrics)

  margin = experiment.network.margin
  size, context = tuple(n + 2 * margin for n in config.crop_size), dict(context=True) if margin else {}
  image = jax.ShapeDtypeStruct((config.batch_size, *size, images_lib.pixels_of(config.data).count), jnp.float32)
  forward = _count(experiment, lambda model, image: model(model.preprocess(image), **context), image)
  wait_share = (lambda seconds: _wait_share(batches(), run, seconds)) if at_hand else None
  return Measured(tuple(config.crop_size), config.batch_size, program, forward, run, wait_share)


def of_eval(config, mesh) -> Measured:
  """The eval step of a config, with its scales, mirror images and windows; otherwise as `of_train`."""
  experiment, at_hand = Experiment(config, mesh=mesh), _at_hand(config.data)
  source = experiment.eval_source if at_hand else None
  batch_size = config.eval.batch_size
  rows = sharding.local_rows(mesh, batch_size)

  def batches():
    first = input_pipeline.eval_canvases(source, config.data)[0]
    while True:
      data = input_pipeline.eval_batches(source, config.data, batch_size=batch_size, rows=rows)
      yield from sharding.to_device(itertools.takewhile(lambda batch: batch["image"].shape[1:3] == first, data), mesh)

  batch = next(batches()) if at_hand else _noise(experiment, batch_size)
  size = batch["image"].shape[1:3]
  program = programs.compile_eval(experiment, size)
  variables = sharding.gather(experiment.init_state().eval_variables(), mesh)

  def run(batch=batch):
    jax.block_until_ready(program.compiled(variables, batch))

  image = jax.ShapeDtypeStruct((batch_size, *size, images_lib.pixels_of(config.data).count), jnp.float32)
  protocol = experiment.protocol
  forward = _count(experiment, lambda model, image: inference.class_scores(model, image, **protocol), image)
  wait_share = (lambda seconds: _wait_share(batches(), run, seconds)) if at_hand else None
  return Measured(size, batch_size, program, forward, run, wait_share)


STEPS = {"train": of_train, "eval": of_eval}


def _at_hand(data) -> bool:
  """Whether the data set of `config.data` is."""
  return data.name == "synthetic" or pathlib.Path(data.dir).expanduser().is_dir()


def _noise(experiment: Experiment, batch_size: int, border: bool = False) -> dict:
  rng, size = np.random.default_rng(0), experiment.config.crop_size
  pixels = images_lib.pixels_of(experiment.config.data)
  batch = dict(
    image=rng.integers(0, 256, (batch_size, *size, pixels.count)).astype(pixels.dtype),
    label=rng.integers(0, experiment.num_classes, (batch_size, *size), np.uint8),
    size=np.full((batch_size, 2), size, np.int32),
    id=np.arange(batch_size, dtype=np.int32),
  )
  if border:
    batch["border"] = np.zeros((batch_size, *size), np.float16)
  return next(sharding.to_device(iter([batch]), experiment.mesh))


def _count(experiment: Experiment, forward, image) -> int:
  return flops.multiply_adds(
    lambda variables, image: forward(steps.merge(experiment.graphdef, variables), image),
    experiment.abstract_state.variables(),
    image,
  )


def _wait_share(batches, run, seconds: float) -> float:
  for _ in range(2):
    run(next(batches))
  waited, begin = 0.0, time.perf_counter()
  while time.perf_counter() - begin < seconds:
    start = time.perf_counter()
    batch = next(batches)
    waited += time.perf_counter() - start
    run(batch)
  return waited / (time.perf_counter() - begin)


def matrix_peak(dtype: str) -> float:
  """FLOP/s of one device at multiplying square matrices: what its steps are compared with."""
  n = 8192 if jax.default_backend() != "cpu" else 2048
  x = jnp.ones((n, n), dtype)
  multiply = jax.jit(lambda x: x @ x)
  jax.block_until_ready(multiply(x))
  return 2 * n**3 / min(timed(lambda: jax.block_until_ready(multiply(x)), 8))


def timed(run: Callable[[], None], count: int) -> list[float]:
  """Seconds of each of `count` runs."""
  seconds = []
  for _ in range(count):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return seconds


def measure(
  config, kind: str, *, seconds: float, torch_forms: tuple[str, ...] = (), torch_python: str = sys.executable
) -> dict:
  """One row of the benchmark.

  Args:
    kind: "train" or "eval".
    seconds: of measurement, at least, after warm-up.
    torch_forms: PyTorch's fastest of these is measured in turn with segjax.
    torch_python: see `Torch`.

  Returns:
    Names and numbers: milliseconds (median, p10, p90), images_per_s, ...; with PyTorch also `torch_*` and `ratio`,
    PyTorch's median over segjax's.

  Raises:
    ConfigError, DataError: what the config's run would raise, and what `Torch` raises.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.space)
  ours = STEPS[kind](config, mesh)
  first = timed(ours.run, 2)[-1]
  count, rival = max(int(seconds / ROUNDS / first), 2), {}
  if torch_forms:
    num_classes = Experiment(config, mesh=mesh).num_classes
    torch = torch_process.Torch(config, kind, ours.batch_size, ours.size, num_classes, torch_python)
    times, rival = _in_turn(ours.run, count, torch, torch_forms, seconds / ROUNDS)
  else:
    times = timed(ours.run, ROUNDS * count)
  step = float(np.median(times))
  work = 2 * ours.forward * (TRAINING if kind == "train" else 1)
  peak = matrix_peak(config.dtype) * mesh.size
  device = mesh.devices.flat[0]
  allocated = (device.memory_stats() or {}).get("peak_bytes_in_use")  # CPUs keep no such count.
  return dict(
    what=kind,
    model=config.model.name,
    dtype=config.dtype,
    batch_size=ours.batch_size,
    size=list(ours.size),
    device=device.device_kind,
    devices=mesh.size,
    steps=len(times),
    median_ms=1e3 * step,
    p10_ms=1e3 * float(np.percentile(times, 10)),
    p90_ms=1e3 * float(np.percentile(times, 90)),
    images_per_s=ours.batch_size / step,
    compile_s=ours.program.seconds,
    memory_bytes=ours.program.peak,
    peak_bytes_in_use=allocated,
    multiply_adds=ours.forward,
    tflops=work / step / 1e12,
    share_of_peak=work / step / peak,
    data_wait_share=ours.wait_share(seconds / 2) if ours.wait_share else None,
    **rival,
  )


def _in_turn(run, count: int, torch: torch_process.Torch, forms: tuple[str, ...], seconds: float) -> tuple[list, dict]:
  """Seconds of our steps, and the row's entries on PyTorch's fastest form, in `ROUNDS` turns of `seconds` each."""
  ours, theirs = [], []
  try:
    trials = {form: float(np.median(torch.steps(form, 3))) for form in forms}
    best = min(trials, key=trials.get)
    for _ in range(ROUNDS):
      # The first step of a turn finds the other's data in the caches and its memory taken back; it counts for neither.
      ours += timed(run, 1 + count)[1:]
      theirs += torch.steps(best, 1 + max(int(seconds / trials[best]), 2))[1:]
  finally:
    torch.close()
  step, milliseconds = float(np.median(theirs)), {form: 1e3 * trial for form, trial in trials.items()}
  names = dict(torch=torch.version, torch_form=best, torch_ms=1e3 * step, torch_trials_ms=milliseconds)
  return ours, names | dict(ratio=step / float(np.median(ours)))


def measure_compilation(config, kind: str) -> dict:
  """One row of --what=compile: the step compiled from scratch, and again from JAX's cache on disk.

  Returns:
    Names and numbers: compile_s, from_cache_s, memory of one device, multiply-adds (backward pass included), bytes of the
    collectives. Nothing is run.

  Raises:
    ConfigError, DataError: what the config's run would raise.
  """
  experiment, data = Experiment(config), config.data
  shape = [tuple(config.crop_size)]
  if _at_hand(data) and kind == "train":
    source = experiment.train_source
    canvas = input_pipeline.train_canvas(source, data, experiment.crop_window)
    shape = [canvas, canvas != input_pipeline.canvas_of(source, data)]
  elif _at_hand(data):
    shape = [input_pipeline.eval_canvases(experiment.eval_source, data)[0]]
  with tempfile.TemporaryDirectory() as folder, _cache_in(folder):
    program = programs.COMPILE[kind](experiment, *shape)
    jax.clear_caches()
    again = programs.COMPILE[kind](Experiment(config), *shape)
  return dict(
    what="compile",
    step=kind,
    model=config.model.name,
    dtype=config.dtype,
    device=experiment.mesh.devices.flat[0].device_kind,
    devices=experiment.mesh.size,
    compile_s=program.seconds,
    from_cache_s=again.seconds,
    arguments_bytes=program.arguments,
    temporary_bytes=program.temporary,
    multiply_adds=program.multiply_adds,
    collective_bytes=sum(map(sum, program.collectives.values())),
  )


@contextlib.contextmanager
def _cache_in(folder: str):
  """JAX's cache of compiled programs in a folder, for programs of any size; off again afterwards."""
  names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in zip(names, (True, folder, 0)):
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # It looks at its settings once.
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def compilation_table(rows: list[dict]) -> str:
  """Rows of `measure_compilation` in Markdown."""
  lines = [
    "| | compile, s | from the cache, s | arguments, GiB | temporary, GiB | GMAC | collectives, MiB |",
    "|---" * 7 + "|",
  ]
  for row in rows:
    lines.append(
      f"| {row['model']} {row['step']} {row['dtype']} | {row['compile_s']:.1f} | {row['from_cache_s']:.1f} |"
      f" {row['arguments_bytes'] / 2**30:.2f} | {row['temporary_bytes'] / 2**30:.2f} | {row['multiply_adds'] / 1e9:.1f} |"
      f" {row['collective_bytes'] / 2**20:.1f} |"
    )
  return "\n".join(lines)


def table(rows: list[dict]) -> str:
  """Rows of `measure` in Markdown."""
  lines = [
    "| | batch, size | step, ms (p10-p90) | images/s | compile, s | memory, GiB | GMAC | TFLOP/s (of peak) | data wait"
    " | PyTorch, ms | PyTorch / segjax |",
    "|---" * 11 + "|",
  ]
  for row in rows:
    wait = "-" if row["data_wait_share"] is None else f"{100 * row['data_wait_share']:.1f} %"
    theirs = f"{row['torch_ms']:.0f} ({row['torch_form']}) | {row['ratio']:.2f}" if "ratio" in row else "- | -"
    lines.append(
      f"| {row['model']} {row['what']} {row['dtype']} | {row['batch_size']}x{row['size'][0]}x{row['size'][1]} |"
      f" {row['median_ms']:.1f} ({row['p10_ms']:.1f}-{row['p90_ms']:.1f}) | {row['images_per_s']:.2f} |"
      f" {row['compile_s']:.1f} | {row['memory_bytes'] / 2**30:.2f} | {row['multiply_adds'] / 1e9:.1f} |"
      f" {row['tflops']:.3g} ({100 * row['share_of_peak']:.0f} %) | {wait} | {theirs} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("benchmark --config=FILE")
