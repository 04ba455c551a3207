"""What is exported: evaluation's own function of an image, with the weights in it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from segjax import inference, kernels, sharding, steps
from segjax.config import ConfigError
from segjax.experiment import Experiment
from segjax.input_pipeline import DataError, images, unlabelled
from segjax.input_pipeline.canvas import pad_batch
from segjax.run.prediction_info import PredictionInfo


@dataclasses.dataclass(frozen=True)
class Program:
  """A network to be exported.

  Attributes:
    experiment: on a mesh of one device.
    variables: {"params", "batch_stats"} to predict with.
    info: classes, colours and the canvas (H, W) that images are laid on, which is known.
    origin: where the weights come from, for people.
  """

  experiment: Experiment
  variables: dict
  info: PredictionInfo
  origin: str

  @property
  def canvas(self) -> tuple[int, int]:
    return self.info.canvas_size

  @property
  def pixels(self) -> images.Pixels:
    return images.pixels_of(self.experiment.config.data)

  def _predict(self, variables: dict, image: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `on_canvas`."""
    config, protocol = self.experiment.config, self.experiment.protocol
    options = dict(outside=config.eval.outside, sigmoid=config.head == "sigmoid", threshold=config.eval.threshold)
    with jax.default_matmul_precision(config.matmul_precision):
      model = steps.merge(self.experiment.graphdef, jax.tree.map(jnp.asarray, variables))
      ids, scores = inference.predict(model, image, size, protocol=protocol, **options)
      return ids, inference.probabilities(scores, **protocol)

  def on_canvas(self) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """predict(image [B, H, W, C], size [B, 2]) -> class ids [B, H, W] uint8, probabilities [B, H, W, K] float32.

    The image lies in the canvas' upper left corner; `size` int32 is its (height, width), outside of which nothing counts.
    Operations have their plain forms, which every platform computes.
    """
    return functools.partial(self._predict, jax.device_get(self.variables))  # Constants of the program, on no device.

  def of_any_size(self) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """predict(image [B, h, w, C]) -> class ids [B, h, w], probabilities [B, h, w, K], of images up to the canvas.

    B, h and w may be symbolic.
    """
    predict_on_canvas = self.on_canvas()

    def predict(image):
      b, h, w, _ = image.shape
      around = ((0, 0), (0, self.canvas[0] - h), (0, self.canvas[1] - w), (0, 0))
      size = jnp.broadcast_to(jnp.stack([jnp.asarray(n, jnp.int32) for n in (h, w)]), (b, 2))
      ids, probabilities = predict_on_canvas(jnp.pad(image, around), size)
      return ids[:, :h, :w], probabilities[:, :h, :w]

    return predict

  def laid(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image [h, w, C] on the canvas, and its size, both as batches of one."""
    batch = pad_batch([unlabelled.example(image, 0)], self.canvas)
    return batch["image"], batch["size"]

  @functools.cached_property
  def _by_own_kernels(self) -> Callable:
    mesh = self.experiment.mesh
    own = kernels.on(kernels.target(mesh, self.experiment.config.kernels))(self._predict)
    return jax.jit(sharding.on(mesh)(own))

  def evaluated(self, image: np.ndarray, variables: dict | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What segjax itself computes for an image [h, w, C]: the ids [h, w] of evaluation's compiled step, and probabilities
    [h, w, K] by the same kernels.

    Args:
      variables: in place of the program's.
    """
    variables = self.variables if variables is None else sharding.gather(variables, self.experiment.mesh)
    h, w = image.shape[:2]
    batch = pad_batch([unlabelled.example(image, 0)] * self.experiment.config.eval.batch_size, self.canvas)
    (on_device,) = sharding.to_device(iter([batch]), self.experiment.mesh)
    ids = self.experiment.eval_step(variables, on_device)["prediction"]
    _, probabilities = self._by_own_kernels(variables, *self.laid(image))
    return np.asarray(ids)[0, :h, :w], np.asarray(probabilities)[0, :h, :w]

  def samples(self, count: int) -> tuple[list[np.ndarray], str]:
    """Images [h, w, C] to check an export with, and what they are: of the evaluation's split, or noise where it is not there."""
    data = self.experiment.config.data
    try:
      found = self._fitting(self.experiment.eval_source, count)
    except (ConfigError, DataError):
      found = []
    if found:
      return found, f"{len(found)} images of {data.eval_split}"
    rng, pixels = np.random.default_rng(0), self.pixels
    high = 256 if pixels.dtype == np.uint8 else 65536 if pixels.dtype == np.uint16 else 1
    shape = (*self.canvas, pixels.count)
    return [(high * rng.random(shape)).astype(pixels.dtype)], f"noise, as {data.eval_split} is not at hand"

  def _fitting(self, source, count: int) -> list[np.ndarray]:
    fitting = (i for i, size in enumerate(source.sizes) if all(n <= m for n, m in zip(size, self.canvas)))
    return [source[index][0] for index in itertools.islice(fitting, count)]
