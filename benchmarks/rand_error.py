"""How well runs keep cells apart, which pixel scores hardly show: the Rand error of ISBI 2012, for two-class runs.

python benchmarks/rand_error.py WORKDIR...

For each threshold of the foreground's probability: the mean Rand error over the validation images, and the foreground's
IoU. Both at 0.5 and at their best thresholds, which the same images choose.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage, sparse

from segjax import config as config_lib
from segjax import inference, sharding, steps
from segjax.experiment import Experiment


def rand_error(truth: np.ndarray, segments: np.ndarray) -> float:
  """1 - F of the pairs of pixels that lie in one segment (adapted Rand error; Arganda-Carreras et al. 2015, section 2.3).

  Args:
    truth, segments: [H, W] int, 0 = none. Pixels without a true segment do not count; one without a predicted one is a
      segment of its own.
  """
  inside = truth > 0
  truth, segments = truth[inside], segments[inside]
  counts = sparse.coo_matrix((np.ones(truth.size), (truth, segments))).tocsc()
  alone = counts[:, 0].sum()
  both = counts[:, 1:].power(2).sum() + alone
  in_truth = (np.asarray(counts.sum(1)) ** 2).sum()
  in_segments = (np.asarray(counts[:, 1:].sum(0)) ** 2).sum() + alone
  return float(1 - 2 * both / (in_truth + in_segments))


def measure(workdir: pathlib.Path) -> str:
  """One line on the last checkpoint of `workdir`."""
  config = config_lib.load(workdir)
  config.eval.checkpoint = "last"
  experiment = Experiment(config, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  source, protocol = experiment.eval_source, experiment.protocol
  variables, step, _ = experiment.trained_variables(workdir, None)

  @jax.jit
  def probability(variables, image):
    model = steps.merge(experiment.graphdef, variables)
    scores = inference.class_scores(model, model.preprocess(image.astype(jnp.float32)), **protocol)
    return inference.foreground_probability(scores, **protocol)[0]

  errors, hits, union = [], 0, 0
  for image, label in map(source.__getitem__, range(len(source))):
    foreground = np.asarray(probability(variables, image[None]))[None] > np.reshape(steps.THRESHOLDS, (-1, 1, 1))
    foreground &= label != config_lib.IGNORE_LABEL
    truth = ndimage.label(label == 1)[0]
    errors.append([rand_error(truth, ndimage.label(f)[0]) for f in foreground])
    hits, union = hits + (foreground & (label == 1)).sum((1, 2)), union + (foreground | (label == 1)).sum((1, 2))
  error, iou, half = np.mean(errors, 0), hits / union, steps.THRESHOLDS.index(0.5)
  best = error.argmin(), iou.argmax()
  return (
    f"{workdir.name}, step {step}: Rand error {error[half]:.4f} at 0.5, {error[best[0]]:.4f} at"
    f" {steps.THRESHOLDS[best[0]]:g}; IoU {iou[half]:.4f} at 0.5, {iou[best[1]]:.4f} at {steps.THRESHOLDS[best[1]]:g}"
  )


if __name__ == "__main__":
  for name in sys.argv[1:]:
    print(measure(pathlib.Path(name)), flush=True)
