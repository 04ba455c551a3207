"""Scoring: whole images against their own labels, one confusion matrix over the split."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from segjax import config as config_lib
from segjax import input_pipeline, metrics, sharding, steps
from segjax.run import checkpoint, outputs, report, warm_start
from segjax.run.checkpoint import Checkpoints
from segjax.state import build, with_sharding


@dataclasses.dataclass
class Evaluation:
  """What an evaluation found.

  Attributes:
    confusion: [K, K] int64 of the whole split.
    scalars: {"val/mean_iou": ...}.
    table: for people.
    pictures: {name: [H, W, 3] uint8}.
  """

  confusion: np.ndarray
  scalars: dict[str, float]
  table: str
  pictures: dict[str, np.ndarray]


@dataclasses.dataclass
class Evaluator:
  """Scores variables on one split; compiled by `compile`, or else at its first call, and not again.

  Attributes:
    source: the split.
    step: from `steps.make_eval_step`.
    config, mesh: of the run.
    programs: {canvas: the step compiled for it}, of `compile`.
  """

  source: object
  step: object
  config: object
  mesh: jax.sharding.Mesh
  programs: dict = dataclasses.field(default_factory=dict)

  def compile(self, variables: dict) -> None:
    """Compiles the step that all calls use, for abstract variables, so that what does not fit says so at once."""
    abstract = with_sharding(variables, sharding.replicated(self.mesh))
    for number, canvas in enumerate(input_pipeline.eval_canvases(self.source, self.config.data)):
      batch_size = self.mesh.shape["data"] if number else self.config.eval.batch_size  # As of `make_batches`.
      batch = steps.abstract_batch(self.mesh, batch_size, canvas)
      self.programs[canvas] = self.step.lower(abstract, batch).compile()

  def __call__(self, variables: dict) -> "Evaluation":
    """Scores of the whole split, and pictures of its first `eval.num_overlays` examples."""
    data = self.config.data
    totals, pictures, pending = {}, {}, None
    for batch in sharding.to_device(make_batches(self.config, self.source, self.mesh), self.mesh):
      canvas = batch["image"].shape[1:3]
      step = self.programs[canvas] if canvas in self.programs else self.step
      out = step(variables, batch)
      if len(pictures) < self.config.eval.num_overlays:
        self._draw(batch, out["prediction"], pictures)
      counts = {name: out[name] for name in ("confusion", "sweep") if name in out}
      if pending is not None:  # One batch late, so that the device already has its next one.
        totals = {name: metrics.add(totals[name] if totals else None, pending[name]) for name in pending}
      pending = counts
    totals = {name: metrics.add(totals[name] if totals else None, pending[name]) for name in pending}
    table = report.class_table(self.source.classes, totals["confusion"])
    if "sweep" in totals:
      table += "\n" + report.threshold_line(totals["sweep"], steps.THRESHOLDS)
    scalars = report.score_scalars(data.eval_split, self.source.classes, totals["confusion"])
    return Evaluation(totals["confusion"], scalars, table, pictures)

  def _draw(self, batch, prediction, pictures):
    """Adds pictures of the examples that this host holds."""
    host = {name: local(value) for name, value in (*batch.items(), ("prediction", prediction))}
    for image, label, size, index, classes in zip(
      host["image"], host["label"], host["size"], host["id"], host["prediction"]
    ):
      if index >= 0 and len(pictures) < self.config.eval.num_overlays:
        crop = np.s_[: size[0], : size[1]]
        picture = report.overlay(image[crop], label[crop], classes[crop], self.source.palette)
        pictures[self.source.describe(int(index))] = picture


def local(array: jax.Array) -> np.ndarray:
  """This host's rows of a batch-sharded array; the devices of `space` hold the same."""
  if array.is_fully_addressable:
    return np.asarray(array)
  parts = {shard.index[0].start: np.asarray(shard.data) for shard in array.addressable_shards}
  return np.concatenate([parts[start] for start in sorted(parts)])


def make_evaluator(config, source, graphdef, mesh) -> Evaluator:
  """The evaluator of one split under `config.eval`.

  Raises:
    ConfigError: a batch that the mesh does not divide.
  """
  sharding.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
  return Evaluator(source, make_step(config, graphdef, mesh, len(source.classes)), config, mesh)


def measure(config) -> dict:
  """What a score depends on beside the weights, as JSON has it: only scores of one measure can be compared."""
  none = ("eval.batch_size", "eval.checkpoint", "eval.num_overlays")
  fields = {name: value for name, value in config_lib.fields(config.eval, "eval.").items() if name not in none}
  return json.loads(json.dumps({"data.eval_split": config.data.eval_split} | fields))


def make_batches(config, source, mesh) -> Iterator[dict]:
  """This host's part of the batches of one split, see `input_pipeline.eval_batches`."""
  rows = {size: sharding.local_rows(mesh, size) for size in (config.eval.batch_size, mesh.shape["data"])}
  (batch_size, per_host), *_ = rows.items()
  return input_pipeline.eval_batches(
    source, config.data, batch_size=batch_size, rows=per_host, single=(mesh.shape["data"], rows[mesh.shape["data"]])
  )


def protocol(config) -> dict:
  """The keywords of `inference.class_scores` that `config.eval` gives."""
  e = config.eval
  return dict(scales=e.scales, flip=e.flip, window=e.window, window_stride=e.window_stride)


def make_step(config, graphdef, mesh, num_classes: int):
  """The step by which everything is scored and predicted under `config.eval`, see `steps.make_eval_step`."""
  return steps.make_eval_step(
    graphdef, mesh, num_classes=num_classes, protocol=protocol(config), outside=config.eval.outside,
    sigmoid=config.head == "sigmoid", threshold=config.eval.threshold, kernels=config.kernels,
  )  # fmt: skip


def predictions(step, variables: dict, batches: Iterator[dict], mesh) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """(id, {"prediction": [h, w] uint8 class ids, and for two classes "probability": [h, w] uint8}) of this host's
  examples, each at its own size.

  Args:
    step: of `make_step`. variables: to predict with.
    batches: host batches as of `input_pipeline`; their `order.PADDING` is left out.
  """
  for batch in sharding.to_device(batches, mesh):
    out = step(variables, batch)
    out = {name: local(out[name]) for name in ("prediction", "probability") if name in out}
    for row, (index, (h, w)) in enumerate(zip(local(batch["id"]), local(batch["size"]))):
      if index != input_pipeline.order.PADDING:
        yield int(index), {name: value[row, :h, :w] for name, value in out.items()}


def evaluate(config, workdir) -> dict[str, float]:
  """--mode=eval: scores the best or last checkpoint of `workdir` on `config.data.eval_split`.

  Where `workdir` holds no run, the weights that `config.init` names are scored as they are. Prints the table, appends
  the scores to `workdir`/eval_SPLIT/metrics.jsonl, and writes overlays beside it; says so where these cannot be written.

  Returns:
    The scores, e.g. {"val/mean_iou": ...}.

  Raises:
    ConfigError: no run or no checkpoint in `workdir`, or one of another model.
    DataError: the split cannot be used.
  """
  workdir = pathlib.Path(workdir)
  loaded = load_weights(config, workdir)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.space)
  split = config.data.eval_split
  results = outputs.output_path(workdir, f"eval_{split}")
  source = input_pipeline.make_source(config.data, split)
  input_pipeline.cache.check_room(config.data.cache, (source,))
  graphdef, _, _, init = build(config, len(source.classes))
  evaluator = make_evaluator(config, source, graphdef, mesh)
  variables, step, origin = trained_variables(config, workdir, loaded, init, mesh)

  evaluation = evaluator(variables)
  written = _write(results, step, evaluation)
  if jax.process_index() == 0:
    window = f", windows {tuple(config.eval.window)}" if any(config.eval.window) else ""
    print(
      f"{split}: {len(source)} images, {origin}, scales {tuple(config.eval.scales)}, flip {config.eval.flip}{window}\n"
      f"{evaluation.table}\n{written}",
      flush=True,
    )
  return evaluation.scalars


def _write(folder: pathlib.Path, step: int, evaluation: Evaluation) -> str:
  """Writes scores and pictures, and tells where they are, or why they are not: the table must not be lost with them."""
  try:
    writer = report.Writer(folder, tensorboard=False)
    writer.scalars(step, evaluation.scalars)
    writer.pictures(step, evaluation.pictures)
  except OSError as error:
    return f"NOT WRITTEN, scores and pictures in {folder}: {error}. The table above is all there is."
  return f"scores and pictures: {folder}"


def load_weights(config, workdir: pathlib.Path | None) -> tuple[dict, str] | None:
  """The weights of `config.init` where `workdir` holds no run; None where it does. For before anything slow.

  Raises:
    ConfigError: neither a run with a checkpoint nor weights.
  """
  if config.init.path and (workdir is None or not (workdir / config_lib.CONFIG_FILE).exists()):
    return warm_start.load(config.init)
  config_lib.load(workdir)  # Says so where this is no workdir, before Orbax makes folders in it.
  checkpoint.check_any(workdir)
  return None


def trained_variables(config, workdir: pathlib.Path | None, loaded, init, mesh) -> tuple[dict, int, str]:
  """What to evaluate: the variables on the mesh, their step, and what to call them.

  Args:
    loaded: of `load_weights`; None takes the checkpoint of `workdir` that `config.eval.checkpoint` names.
    init: of `state.build`.

  Raises:
    ConfigError: weights of another model, or damaged ones.
  """
  abstract = jax.eval_shape(init)
  if loaded is not None:
    # Strictly all: what init.exclude leaves random would only be scored as noise.
    variables, origin = warm_start.merge(abstract.variables(), loaded, ())
    return sharding.gather(variables, mesh), 0, origin
  with Checkpoints(workdir, read_only=True) as checkpoints:
    best, last = checkpoints.best_step(), checkpoints.latest_step()
    step = best if config.eval.checkpoint == "best" and best is not None else last
    state = checkpoints.restore(with_sharding(abstract, sharding.of_state(mesh, abstract, config.shard_state)), step)
  variables = sharding.gather(state.eval_variables(), mesh)
  return variables, step, f"checkpoint of step {step} ({'best' if step == best else 'last'})"


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("main --mode=eval --workdir=RUN")
