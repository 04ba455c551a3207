"""The contracts of networks and their backbones, with what all networks have in common."""

import jax
from flax import nnx

from segjax.models import layers, resize


class Network(layers.Block):
  """A network for semantic segmentation, for images of any size.

  A subclass has `normalize(image)`, raw RGB in [0, 255], [B, H, W, 3] -> float, and `scores`, see `__call__`.

  Attributes:
    mean: the raw pixel that pads crops; `preprocess` maps it to 0.
    coarsest_stride: of its coarsest features, pixels of the image.
    margin: pixels that it needs around a training crop; 0 but for an unpadded U-Net.
    align_corners: the convention of resizing its logits (`models/resize.py`).
    dtype: of the computation.
    statistics: (mean, deviation) of each channel where images are not RGB, or are to be standardised by their own; then
      `mean` is that one. None: `normalize`.
  """

  margin = 0
  align_corners = True
  statistics = None

  def preprocess(self, image: jax.Array) -> jax.Array:
    """Raw image [B, H, W, C] -> float; `mean` becomes 0."""
    return self.normalize(image) if self.statistics is None else layers.standardize(image, *self.statistics)

  def __call__(
    self,
    image: jax.Array,
    train: bool = False,
    key: jax.Array | None = None,
    *,
    upsample: bool = True,
    context: bool = False,
    endpoints: dict | None = None,
  ) -> jax.Array:
    """Preprocessed image [B, H, W, 3] -> logits [B, H, W, num_classes], float32 (float64 under float64).

    The network's own are `scores(image, size, train, key, endpoints)`, of an image in `dtype`, where `size` is (H, W) of
    the logits.

    Args:
      train: batch statistics instead of running ones, and dropout.
      key: for dropout; without it there is none.
      upsample: whether logits are resized to the image's size. Off: as they are before a last interpolation, where the
        network ends with one.
      context: `image` has `margin` pixels more on each side than the logits shall have.
      endpoints: filled with named intermediate results: "logits" before resizing, "auxiliary" of a second classifier, and
        the network's own.
    """
    endpoints = {} if endpoints is None else endpoints
    size = tuple(n - 2 * self.margin if context else n for n in image.shape[1:3])
    scores = self.scores(image.astype(self.dtype), size, train, key, endpoints)
    logits = endpoints["logits"] = scores.astype(layers.param_dtype(self.dtype))
    return resize.resize_bilinear(logits, size, self.align_corners) if upsample else logits


class Backbone(nnx.Module):
  """A network for classification without its classifier.

  backbone(image, train, endpoints, key=None) -> features [B, H / output_stride, W / output_stride, `features`], rounded up,
  of a preprocessed image; fills `endpoints`. The key is for a VGG's dropout; the others have none.

  Attributes:
    pyramid: {2: (end point, channels), 4: ..., 8: ..., 16: ..., 32: ...}, the last features at each stride of the network for
      classification. Those behind the output stride have that.
    low_levels: {end point: channels} of stride 4 that a decoder may take, the usual one first.
    low_level: the one that it takes.
    auxiliary: what an auxiliary head takes, (end point, channels), and the channels of its convolution; None: it has none
      for one.
    normalization: what images it was first trained on, see `backbones.normalize`.
    ends_pooled: whether its features are a pooling's result, without a convolution behind it.
  """

  auxiliary = None
  normalization = "symmetric"
  ends_pooled = False

  @property
  def features(self) -> int:
    """Channels of the features."""
    return self.pyramid[32][1]


def check_share(**options: float) -> None:
  """Raises ValueError where an option, dropout or a momentum, is not in [0, 1)."""
  for name, value in options.items():
    if not 0 <= value < 1:
      raise ValueError(f"model.{name} = {value} must lie in [0, 1).")
