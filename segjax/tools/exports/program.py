"""What is exported: evaluation's own function of one image at one scale, with the weights in it."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from segjax import inference, sharding, steps
from segjax.config import IGNORE_LABEL
from segjax.input_pipeline import canvas as canvas_lib
from segjax.run import prediction_info
from segjax.run.prediction_info import PredictionInfo


@dataclasses.dataclass(frozen=True)
class Program:
  """A network of a run, to be exported.

  Attributes:
    experiment: on a mesh of one device.
    variables: {"params", "batch_stats"} to predict with.
    info: of the run: classes, colours, EXIF rule, and `canvas_size`, the (H, W) that images are laid on.
    origin: where the weights come from, for people.
  """

  experiment: object
  variables: dict
  info: PredictionInfo
  origin: str

  @property
  def canvas(self) -> tuple[int, int]:
    return self.info.canvas_size

  @property
  def channels(self) -> int:
    """Of the images."""
    return len(self.experiment.network.mean)

  @property
  def protocol(self) -> dict:
    """Evaluation's at a single scale, without the mirror image; with its sliding windows, if it has such."""
    return self.experiment.protocol | dict(scales=(1.0,), flip=False)

  def function(self) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """predict(image [B, h, w, C] uint8) -> (class ids [B, h, w] uint8, probabilities [B, h, w, K] float32).

    h and w are at most the canvas', and may be symbolic. Operations have their plain forms, which every platform computes.
    """
    config, experiment = self.experiment.config, self.experiment
    options = dict(outside=config.eval.outside, sigmoid=config.head == "sigmoid", threshold=config.eval.threshold)
    variables = jax.device_get(self.variables)  # Constants of the program, on no device.

    @jax.default_matmul_precision(config.matmul_precision)
    def predict(image):
      model = steps.merge(experiment.graphdef, jax.tree.map(jnp.asarray, variables))
      b, h, w, _ = image.shape
      around = ((0, 0), (0, self.canvas[0] - h), (0, self.canvas[1] - w), (0, 0))
      size = jnp.broadcast_to(jnp.stack([jnp.asarray(n, jnp.int32) for n in (h, w)]).reshape(1, 2), (b, 2))
      ids, scores = inference.predict(model, jnp.pad(image, around), size, protocol=self.protocol, **options)
      return ids[:, :h, :w], inference.probabilities(scores, **self.protocol)[:, :h, :w]

    return predict

  def evaluated(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What segjax' own evaluation step gives for one image [h, w, C] uint8: ids [h, w] and probabilities [h, w, K]."""
    h, w = image.shape[:2]
    label = np.full((h, w), IGNORE_LABEL, np.uint8)
    example = dict(image=image, label=label, size=np.array((h, w), np.int32), id=np.int32(0))
    (batch,) = sharding.to_device(iter([canvas_lib.pad_batch([example], self.canvas)]), self.experiment.mesh)
    out = self._step(self.variables, batch)
    return np.asarray(out["prediction"])[0, :h, :w], np.asarray(out["probabilities"])[0, :h, :w]
