"""Atrous spatial pyramid pooling (DeepLabV3, arXiv 1706.05587, section 3.3), separable as in DeepLabV3+."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers

# Standard deviations of the truncated normal that separable convolutions of head and decoder begin with (official).
SEPARABLE_INIT = dict(
  depthwise_init=nnx.initializers.truncated_normal(0.33), pointwise_init=nnx.initializers.truncated_normal(0.06)
)
HEAD_EPSILON = 1e-5  # Of the batch norms in head and decoder; the backbones have 1e-3.


class ASPP(nnx.Module):
  """The mean of the whole map, a 1x1 convolution and 3x3 convolutions at several rates, joined by a 1x1 convolution.

  Args:
    in_features: channels of the backbone's features.
    rates: one branch each; () for none.
    separable: whether these are depthwise separable (arXiv 1802.02611, section 3.1).
    image_pooling: whether there is a branch for the mean, over all of the map including padded area.
    dropout: rate at the end.
    options: norm, dtype, rngs.
  """

  features = 256

  def __init__(self, in_features, *, rates, separable, image_pooling, dropout, options):
    width = self.features
    dense = dict(kernel_init=nnx.initializers.glorot_uniform(), **options)
    self.rates, self.pools, self.separable, self.dropout = tuple(rates), image_pooling, separable, dropout
    if image_pooling:
      self.pooling = layers.ConvNorm(in_features, width, **dense)
    self.branch0 = layers.ConvNorm(in_features, width, **dense)
    for n, rate in enumerate(rates, start=1):
      if separable:
        branch = layers.SeparableConv(in_features, width, rate=rate, **SEPARABLE_INIT, **options)
      else:
        branch = layers.ConvNorm(in_features, width, 3, rate=rate, **dense)
      setattr(self, f"branch{n}", branch)
    self.projection = layers.ConvNorm((image_pooling + 1 + len(rates)) * width, width, **dense)

  def __call__(self, x: jax.Array, train: bool, key: jax.Array | None, endpoints: dict) -> jax.Array:
    """[B, h, w, in] -> [B, h, w, 256]."""
    branches = []
    if self.pools:
      pooled = endpoints["aspp/pooling"] = self.pooling(x.mean((1, 2), keepdims=True), train)  # [B, 1, 1, 256]
      branches.append(jnp.broadcast_to(pooled, (*x.shape[:3], self.features)))
    branches.append(self.branch0(x, train))
    endpoints["aspp/branch0"] = branches[-1]
    for n in range(1, len(self.rates) + 1):
      branch, name = getattr(self, f"branch{n}"), f"aspp/branch{n}"
      branches.append(branch(x, train, endpoints, name) if self.separable else branch(x, train))
      endpoints[name] = branches[-1]
    x = endpoints["aspp/concat"] = jnp.concatenate(branches, axis=-1)
    x = endpoints["aspp/projection"] = self.projection(x, train)
    return layers.dropout(x, self.dropout, key if train else None)
