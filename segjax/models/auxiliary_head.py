"""The auxiliary head that three of the models may have."""

import jax
from flax import nnx

from segjax.models import layers


class AuxiliaryHead(nnx.Module):
  """A second classifier on inner features, whose loss helps in training (Zhao et al. 2017, arXiv 1612.01105, section 3.3).

  3x3 convolution, batch norm, ReLU, dropout of 0.1, 1x1 convolution to the classes.

  Args:
    endpoint, in_features: whose features, and their channels.
    width: channels of the convolution.
    options: norm, dtype, rngs.
  """

  def __init__(self, endpoint: str, in_features: int, width: int, num_classes: int, *, options):
    rest = {k: v for k, v in options.items() if k != "norm"}
    self.endpoint = endpoint
    self.conv = layers.ConvNorm(in_features, width, 3, **options)
    self.logits = layers.Conv(width, num_classes, 1, use_bias=True, **rest)

  def __call__(self, train: bool, key: jax.Array | None, endpoints: dict) -> None:
    """From the end point to "auxiliary", logits of its size, float32 (float64 under float64)."""
    key = jax.random.fold_in(key, 1) if train and key is not None else None  # Not the main classifier's.
    x = layers.dropout(self.conv(endpoints[self.endpoint], train), 0.1, key)
    endpoints["auxiliary"] = self.logits(x).astype(layers.param_dtype(self.logits.dtype))
