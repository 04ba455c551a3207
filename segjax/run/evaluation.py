"""Scores and predictions of whole images: the counts of a split, or each image's own result."""

import dataclasses
from collections.abc import Collection, Iterator
from typing import NamedTuple

import jax
import numpy as np

from segjax import input_pipeline, metrics, sharding, steps
from segjax.run import pictures as pictures_lib
from segjax.run import report
from segjax.state import with_sharding


class Example(NamedTuple):
  """One of the worst or of the median images.

  Attributes:
    rank: "worst" or "median".
    name: as of `source.describe`.
    iou: its own, see `metrics.ImageScores`.
    picture: [h, 4w, 3] uint8, see `pictures.comparison`.
  """

  rank: str
  name: str
  iou: float
  picture: np.ndarray


@dataclasses.dataclass
class Evaluation:
  """The result of an evaluation.

  Attributes:
    totals: of the whole split.
    scalars: {"val/mean_iou": ...}.
    table: for people.
    pictures: {name: [H, W, 3] uint8} of the first images.
    examples: the worst, from the worst on, and the median ones.
    source: the split. config: under which it was scored.
  """

  totals: metrics.Totals
  scalars: dict[str, float]
  table: str
  pictures: dict[str, np.ndarray]
  examples: list[Example]
  source: object
  config: object

  @property
  def confusion(self) -> np.ndarray:
    """[K, K] int64 of the whole split."""
    return self.totals.confusion


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
    """Compiles the step that all calls use, for abstract variables, so that a lack of memory shows at once."""
    abstract = with_sharding(variables, sharding.replicated(self.mesh))
    for canvas, batch_size in batch_shapes(self.config, self.source, self.mesh):
      batch = steps.abstract_batch(self.mesh, batch_size, canvas, self.source.pixels)
      self.programs[canvas] = self.step.lower(abstract, batch).compile()

  def __call__(self, variables: dict) -> "Evaluation":
    """Scores of the whole split, and pictures of `eval.num_overlays` examples each: the first, the worst, the median."""
    split, classes, most = self.config.data.eval_split, self.source.classes, self.config.eval.num_overlays
    totals, pictures, pending = metrics.Totals(len(classes), most), {}, None
    for batch, out in self._scored(variables):
      if len(pictures) < most:
        self._draw(batch, out["prediction"], pictures)
      if pending is not None:  # Read one batch late, so that the device is never idle.
        totals.add(pending)
      pending = {name: value for name, value in out.items() if name not in ("prediction", "probability")}
    totals.add(pending)
    scalars = report.score_scalars(split, classes, totals)
    table = "\n".join([report.class_table(classes, totals.confusion), report.image_line(split, scalars)])
    if totals.sweep is not None:
      table += "\n" + report.threshold_line(totals.sweep, steps.THRESHOLDS)
    return Evaluation(totals, scalars, table, pictures, self._examples(variables, totals), self.source, self.config)

  def _scored(self, variables: dict, only: Collection[int] | None = None) -> Iterator[tuple[dict, dict]]:
    """Each batch on the devices, with what the step gives for it; of all examples, or of those with the ids `only`."""
    for batch in sharding.to_device(make_batches(self.config, self.source, self.mesh, only), self.mesh):
      canvas = batch["image"].shape[1:3]
      step = self.programs[canvas] if canvas in self.programs else self.step
      yield batch, step(variables, batch)

  def _examples(self, variables: dict, totals: metrics.Totals) -> list[Example]:
    """The worst and the median images: read and predicted once more, now that all scores tell which these are.

    A few batches more, and meanwhile no image was kept or fetched; every process chooses the same ones.
    """
    ranked = [("worst", *item) for item in totals.images.worst()] + [("median", *x) for x in totals.images.median()]
    drawn, only = {}, [index for _, index, _ in ranked]
    for batch, out in self._scored(variables, only) if only else ():
      whole = {name: batch[name] for name in ("image", "label", "size", "id")} | dict(prediction=out["prediction"])
      whole = jax.device_get(sharding.gather(whole, self.mesh))
      for row, index in enumerate(whole["id"].tolist()):
        crop = np.s_[row, : whole["size"][row, 0], : whole["size"][row, 1]]
        if index in only:
          image, label, classes = (whole[name][crop] for name in ("image", "label", "prediction"))
          drawn[index] = pictures_lib.comparison(pictures_lib.visible(image), label, classes, self.source.palette)
    return [Example(rank, self.source.describe(index), iou, drawn[index]) for rank, index, iou in ranked]

  def _draw(self, batch, prediction, pictures):
    """Adds pictures of the examples that this host holds."""
    host = {name: local(value) for name, value in (*batch.items(), ("prediction", prediction))}
    for image, label, size, index, classes in zip(
      host["image"], host["label"], host["size"], host["id"], host["prediction"]
    ):
      if index >= 0 and len(pictures) < self.config.eval.num_overlays:
        crop = np.s_[: size[0], : size[1]]
        picture = pictures_lib.overlay(
          pictures_lib.visible(image[crop]), label[crop], classes[crop], self.source.palette
        )
        pictures[self.source.describe(int(index))] = picture


def local(array: jax.Array) -> np.ndarray:
  """This host's rows of a batch-sharded array; the devices of `space` hold the same."""
  if array.is_fully_addressable:
    return np.asarray(array)
  parts = {shard.index[0].start: np.asarray(shard.data) for shard in array.addressable_shards}
  return np.concatenate([parts[start] for start in sorted(parts)])


def batch_shapes(config, source, mesh) -> list[tuple[tuple[int, int], int]]:
  """(canvas, batch size over all devices) of the batches of `make_batches`; images above the first canvas go one to a device."""
  canvases = input_pipeline.eval_canvases(source, config.data)
  return [(canvas, mesh.shape["data"] if n else config.eval.batch_size) for n, canvas in enumerate(canvases)]


def make_batches(config, source, mesh, only: Collection[int] | None = None) -> Iterator[dict]:
  """This host's part of the batches of one split, see `input_pipeline.eval_batches`; of the examples `only`, if given."""
  rows = {size: sharding.local_rows(mesh, size) for size in (config.eval.batch_size, mesh.shape["data"])}
  (batch_size, per_host), *_ = rows.items()
  single = mesh.shape["data"], rows[mesh.shape["data"]]
  return input_pipeline.eval_batches(
    source, config.data, batch_size=batch_size, rows=per_host, single=single, only=only
  )


def predictions(step, variables: dict, batches: Iterator[dict], mesh) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """(id, {"prediction": [h, w] uint8 class ids, and for two classes "probability": [h, w] uint8}) of this host's
  examples, each at its own size.

  Args:
    step: of `steps.make_eval_step`. variables: to predict with.
    batches: host batches, see `input_pipeline`; examples of the id `order.PADDING` are left out.
  """
  for batch in sharding.to_device(batches, mesh):
    out = step(variables, batch)
    out = {name: local(out[name]) for name in ("prediction", "probability") if name in out}
    for row, (index, (h, w)) in enumerate(zip(local(batch["id"]), local(batch["size"]))):
      if index != input_pipeline.order.PADDING:
        yield int(index), {name: value[row, :h, :w] for name, value in out.items()}
