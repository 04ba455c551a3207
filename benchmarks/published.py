"""Published DeepLab networks (TFLite files), by TFLite and by segjax, on the same images of a VOC folder.

python benchmarks/published.py FILE.tflite VOC_FOLDER [--split=val] [--images=N]

Prints the share of pixels on which both predict the same class, how far the two confusion matrices are apart, and both
pixel accuracies and IoUs. Images lie on 513x513, and the padding does not count. Needs pip install ai-edge-litert.
"""

import argparse
import itertools
import os
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from segjax import inference, metrics, sharding
from segjax.config import default_config
from segjax.experiment import Experiment
from segjax.input_pipeline import datasets
from segjax.run import evaluation, warm_start

# Model options by file. All have no decoder and no atrous branches.
NETWORKS = {
  "deeplabv3_257_mv_gpu": dict(depth_multiplier=0.5, output_stride=8),
  "deeplabv3_mnv2_dm05_pascal": dict(depth_multiplier=0.5, output_stride=8),
  "deeplabv3_mnv2_pascal_quant": dict(output_stride=16),
}


class TFLite:
  """A network as TFLite runs it: raw RGB in [0, 255], [1, H, W, 3] float32 -> its only output, in float where quantised."""

  def __init__(self, path: pathlib.Path):
    # Its default delegate crashes on quantised networks.
    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    self.interpreter = Interpreter(str(path), experimental_op_resolver_type=resolver, num_threads=os.cpu_count())
    self.interpreter.allocate_tensors()

  def __call__(self, image: np.ndarray) -> np.ndarray:
    (given,), (made,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()
    raw = given["dtype"] == np.uint8
    self.interpreter.set_tensor(
      given["index"], np.round(image).astype(np.uint8) if raw else image * np.float32(2 / 255) - 1
    )
    self.interpreter.invoke()
    output, (scale, zero) = self.interpreter.get_tensor(made["index"]), made["quantization"]
    return (output - np.float32(zero)) * np.float32(scale) if scale else output


def experiment_of(path: pathlib.Path, data_dir: str, split: str) -> Experiment:
  """The published network in `path` on a split of a VOC folder, one image at a time."""
  config = default_config(model="deeplab_v3plus", data="voc")
  config.data.dir, config.data.eval_split, config.data.canvas_size = str(data_dir), split, datasets.VOC_CANVAS
  config.model.update(backbone="mobilenet_v2", atrous_rates=(), decoder=False, **NETWORKS[path.stem])
  config.init.path, config.init.scheme, config.mesh.data = str(path), "tf_deeplab", 1
  config.eval.batch_size = 1
  return Experiment(config, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def predictions(path: pathlib.Path, data_dir: str, split: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """(label, TFLite's prediction, ours) of each image of a split, [h, w] each."""
  experiment, tflite = experiment_of(path, data_dir, split), TFLite(path)
  variables, *_ = experiment.trained_variables(None, warm_start.load(experiment.config.init))
  for batch in evaluation.make_batches(experiment.config, experiment.eval_source, experiment.mesh):
    theirs = tflite(np.asarray(inference.blank_padding(batch["image"], batch["size"], (127.5,) * 3)))
    (on_mesh,) = sharding.to_device(iter([batch]), experiment.mesh)
    ours = np.asarray(experiment.eval_step(variables, on_mesh)["prediction"])
    (h, w), label = batch["size"][0], batch["label"]
    yield tuple(array[0, :h, :w] for array in (label, theirs, ours))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("file", type=pathlib.Path)
  parser.add_argument("data")
  parser.add_argument("--split", default="val")
  parser.add_argument("--images", type=int, help="only the first so many")
  args = parser.parse_args()
  classes = len(datasets.VOC_CLASSES)
  confusion, equal, pixels, images = np.zeros((2, classes, classes), np.int64), 0, 0, 0
  for label, *both in itertools.islice(predictions(args.file, args.data, args.split), args.images):
    confusion += [np.asarray(metrics.confusion_matrix(label, prediction, classes)) for prediction in both]
    equal, pixels, images = equal + (both[0] == both[1]).sum(), pixels + label.size, images + 1
  apart = np.abs(confusion[0] - confusion[1]).sum() / 2  # A pixel that moves is one less and one more.
  print(
    f"{args.file.name}, {images} images of {args.split}: {equal} of {pixels} pixels equal ({100 * equal / pixels:.4f} %)"
  )
  print(f"confusion matrices: {apart:.0f} of {confusion[0].sum()} labelled pixels in another place")
  theirs, ours = (metrics.scores(matrix) for matrix in confusion)
  print("| | TFLite | segjax |\n|---|---|---|")
  print(f"| pixel accuracy | {theirs['pixel_accuracy']:.4f} | {ours['pixel_accuracy']:.4f} |")
  for n, name in enumerate(datasets.VOC_CLASSES):
    if confusion[0][n].any():
      print(f"| {name} | {theirs['iou_per_class'][n]:.4f} | {ours['iou_per_class'][n]:.4f} |")


if __name__ == "__main__":
  main()
