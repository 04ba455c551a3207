"""How fast the compiled steps are: the train and eval part of segjax.benchmark, alone or in turn with PyTorch."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from segjax import config as config_lib
from segjax import evaluate, flops, inference, input_pipeline, sharding, state, steps, train
from segjax.config import ConfigError

TRAINING = 3  # A backward pass costs about two forward passes, so a step of training counts as three.
ROUNDS = 4  # Of measurements in turn.
TORCH_PROGRAM = pathlib.Path(__file__).parents[1] / "benchmarks" / "torch_speed.py"
# As FORMS of benchmarks/torch_speed.py, and the options of config.model that its networks follow.
TORCH_FORMS = ("nchw", "channels_last", "compiled", "compiled_channels_last")
TORCH_OPTIONS = {
  "unet": ("width", "depth"),
  "fcn": ("width", "stride"),
  "deeplab_v3plus": ("backbone", "output_stride"),
}


@dataclasses.dataclass
class Program:
  """A compiled step with its arguments on the devices; `run()` runs it once, to its end.

  Attributes:
    size: (H, W) of the images that the network sees. batch_size: of all devices.
    compile_seconds: tracing, lowering and compilation, no cache.
    memory: bytes on each device while the step runs: arguments, results and what it needs between.
    multiply_adds: of one step's forward passes.
    run, wait_share: `wait_share(seconds)` runs on the config's data for that long, and gives the share of the time that
      was spent waiting for it; None without data.
  """

  size: tuple[int, int]
  batch_size: int
  compile_seconds: float
  memory: int
  multiply_adds: int
  run: Callable[[], None]
  wait_share: Callable[[float], float] | None


def train_program(config, mesh) -> Program:
  """The train step of a config. Where its data is at hand, on the first batch of it, else on noise.

  Raises:
    ConfigError, DataError: what training raises.
  """
  source, classes = _source(config, config.data.train_split)
  graphdef, optimizer, _, init = state.build(config, classes)
  placed = sharding.of_state(mesh, jax.eval_shape(init), config.shard_state)
  weights = np.ones(classes, np.float32) if config.loss.class_weights else None  # Which ones costs the same.
  step = train.make_step(config, graphdef, optimizer, mesh, placed, weights)
  rows = sharding.local_rows(mesh, config.batch_size)

  def batches():
    data = input_pipeline.train_batches(
      source, config.data, seed=config.seed, batch_size=config.batch_size, rows=rows, start_step=0, num_steps=1 << 30,
      border=config.loss.border_weight > 0,
    )  # fmt: skip
    return sharding.to_device(data, mesh)

  batch = next(batches()) if source else _noise(config.batch_size, config.crop_size, classes, mesh)
  current = state.materialize(init, placed)
  compiled, seconds = _compile(step, current, batch)
  holder = [current]  # The state is donated, so each call takes the last one's.

  def run(batch=batch):
    holder[0], metrics = compiled(holder[0], batch)
    jax.block_until_ready(metrics)

  model = steps.merge(graphdef, jax.eval_shape(init).variables())
  size = tuple(n + 2 * model.border for n in config.crop_size)
  forward = jax.ShapeDtypeStruct((config.batch_size, *size, 3), jnp.float32)
  context = dict(context=True) if model.border else {}
  count = _count(graphdef, init, lambda model, image: model(model.preprocess(image), **context), forward)
  return Program(
    tuple(config.crop_size), config.batch_size, seconds, _memory(compiled), count, run,
    (lambda seconds: _wait_share(batches(), run, seconds)) if source else None,
  )  # fmt: skip


def eval_program(config, mesh) -> Program:
  """The eval step of a config, with its scales, mirror images and windows; otherwise as `train_program`."""
  source, classes = _source(config, config.data.eval_split)
  graphdef, _, _, init = state.build(config, classes)
  step = evaluate.make_step(config, graphdef, mesh, classes)
  size, batch_size = config.crop_size, config.eval.batch_size
  rows = sharding.local_rows(mesh, batch_size)

  def batches():
    while True:
      data = input_pipeline.eval_batches(source, config.data, batch_size=batch_size, rows=rows)
      yield from sharding.to_device(data, mesh)

  batch = next(batches()) if source else _noise(batch_size, size, classes, mesh)
  variables = sharding.gather(state.materialize(init, sharding.replicated(mesh)).variables(), mesh)
  compiled, seconds = _compile(step, variables, batch)

  def run(batch=batch):
    jax.block_until_ready(compiled(variables, batch))

  size, protocol = batch["image"].shape[1:3], evaluate.protocol(config)
  image = jax.ShapeDtypeStruct((batch_size, *size, 3), jnp.float32)
  count = _count(graphdef, init, lambda model, image: inference.class_scores(model, image, **protocol), image)
  return Program(
    size, batch_size, seconds, _memory(compiled), count, run,
    (lambda seconds: _wait_share(batches(), run, seconds)) if source else None,
  )  # fmt: skip


PROGRAMS = {"train": train_program, "eval": eval_program}


def _source(config, split: str):
  """The source of a split and its number of classes; None and the number, where the data is not at hand."""
  if config.data.name == "synthetic" or pathlib.Path(config.data.dir).expanduser().is_dir():
    source = input_pipeline.make_source(config.data, split)
    return source, len(source.classes)
  return None, len(input_pipeline.named_classes(config.data)[0])


def _noise(batch_size: int, size: tuple[int, int], classes: int, mesh) -> dict:
  rng = np.random.default_rng(0)
  batch = dict(
    image=rng.integers(0, 256, (batch_size, *size, 3), np.uint8),
    label=rng.integers(0, classes, (batch_size, *size), np.uint8),
    size=np.full((batch_size, 2), size, np.int32), id=np.arange(batch_size, dtype=np.int32),
  )  # fmt: skip
  return next(sharding.to_device(iter([batch]), mesh, depth=0))


def _compile(step, *arguments):
  start = time.perf_counter()
  compiled = step.lower(*arguments).compile()
  return compiled, time.perf_counter() - start


def _memory(compiled) -> int:
  used = compiled.memory_analysis()
  return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes


def _count(graphdef, init, forward, image) -> int:
  variables = jax.eval_shape(init).variables()
  return flops.multiply_adds(
    lambda variables, image: forward(steps.merge(graphdef, variables), image), variables, image
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
  return 2 * n**3 / min(_timed(lambda: jax.block_until_ready(multiply(x)), 8))


def _timed(run: Callable[[], None], count: int) -> list[float]:
  seconds = []
  for _ in range(count):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
  return seconds


class Torch:
  """PyTorch running the same network in a process of its own, a step at a time when told to.

  Args:
    kind: "train" or "eval".
    program: whose batch and size it takes.

  Raises:
    ConfigError: model options that its network has not, or no PyTorch here.
  """

  def __init__(self, config, kind: str, program: Program, num_classes: int):
    _check_torch_options(config)
    options = {name: config.model[name] for name in TORCH_OPTIONS[config.model.name]}
    spec = dict(
      network=config.model.name, options=options, num_classes=num_classes, batch_size=program.batch_size,
      size=program.size, dtype=config.dtype,
    )  # fmt: skip
    self._kind = kind
    self._process = subprocess.Popen(
      [sys.executable, str(TORCH_PROGRAM), json.dumps(spec)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    line = self._process.stdout.readline()
    if not line:
      raise ConfigError("--compare=torch needs PyTorch here: pip install torch (see benchmarks/README.md).")
    self.version = json.loads(line)["torch"]

  def steps(self, form: str, count: int) -> list[float] | None:
    """Seconds of each of so many steps in one of `TORCH_FORMS`; None if PyTorch cannot run it."""
    self._process.stdin.write(f"{self._kind} {form} {count}\n")
    self._process.stdin.flush()
    answer = self._process.stdout.readline()
    if not answer:
      raise ConfigError(f"PyTorch failed in the form {form}; its error stands above. Leave it out with --torch_forms.")
    return json.loads(answer)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def _check_torch_options(config) -> None:
  if config.model.name not in TORCH_OPTIONS:
    raise ConfigError(f"--compare=torch knows {', '.join(TORCH_OPTIONS)}, not {config.model.name}.")
  defaults = config_lib.fields(config_lib.default_config(model=config.model.name).model)
  own = config_lib.fields(config.model)
  ignored = ("name", "dropout", "bn_momentum", *TORCH_OPTIONS[config.model.name])  # Those cost next to nothing.
  other = [name for name in own if name not in ignored and own[name] != defaults[name]]
  if other:
    raise ConfigError(
      f"--compare=torch: PyTorch's network has segjax's defaults in {', '.join(f'model.{n}' for n in other)}. Set them"
      " back, or leave the comparison out."
    )


def measure(config, kind: str, *, seconds: float, torch_forms: tuple[str, ...] = ()) -> dict:
  """One row of the benchmark.

  Args:
    kind: "train" or "eval".
    seconds: of measurement, at least, after warm-up.
    torch_forms: PyTorch's best of these is measured in turn with segjax.

  Returns:
    Names and numbers: milliseconds (median, p10, p90), images_per_s, ...; with PyTorch also `torch_*` and `ratio`,
    PyTorch's median over segjax's.

  Raises:
    ConfigError, DataError: what the config's run would raise, and what `Torch` raises.
  """
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.space)
  program = PROGRAMS[kind](config, mesh)
  first = _timed(program.run, 2)[-1]
  count = max(int(seconds / ROUNDS / first), 2)
  times, rival = [], {}
  if torch_forms:
    torch = Torch(config, kind, program, _source(config, config.data.train_split)[1])
    try:
      trials = {form: float(np.median(torch.steps(form, 3))) for form in torch_forms}
      best = min(trials, key=trials.get)
      theirs = []
      for _ in range(ROUNDS):
        times += _timed(program.run, count)
        theirs += torch.steps(best, max(int(seconds / ROUNDS / trials[best]), 2))
    finally:
      torch.close()
    rival = dict(
      torch=torch.version, torch_form=best, torch_ms=1e3 * float(np.median(theirs)),
      torch_trials_ms={form: 1e3 * trial for form, trial in trials.items()},
      ratio=float(np.median(theirs) / np.median(times)),
    )  # fmt: skip
  else:
    times = _timed(program.run, ROUNDS * count)
  step = float(np.median(times))
  work = 2 * program.multiply_adds * (TRAINING if kind == "train" else 1)
  peak = matrix_peak(config.dtype) * mesh.size
  device = mesh.devices.flat[0]
  allocated = (device.memory_stats() or {}).get("peak_bytes_in_use")  # CPUs keep no such count.
  return dict(
    what=kind, model=config.model.name, dtype=config.dtype, batch_size=program.batch_size, size=list(program.size),
    device=device.device_kind, devices=mesh.size, steps=len(times), median_ms=1e3 * step,
    p10_ms=1e3 * float(np.percentile(times, 10)), p90_ms=1e3 * float(np.percentile(times, 90)),
    images_per_s=program.batch_size / step, compile_s=program.compile_seconds, memory_bytes=program.memory,
    peak_bytes_in_use=allocated, multiply_adds=program.multiply_adds, tflops=work / step / 1e12,
    share_of_peak=work / step / peak,
    data_wait_share=program.wait_share(seconds / 2) if program.wait_share else None, **rival,
  )  # fmt: skip


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
