"""Atrous spatial pyramid pooling (DeepLabV3, arXiv 1706.05587, section 3.3), separable as in DeepLabV3+."""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import layers
from segjax.models.deeplab_details import Details

# How the separable convolutions of head and decoder are initialised (official).
SEPARABLE_INIT = dict(
  depthwise_init=nnx.initializers.truncated_normal(0.33), kernel_init=nnx.initializers.truncated_normal(0.06)
)
HEAD_EPSILON = 1e-5  # Of the batch norms in head and decoder.


def make_conv(
  in_features: int, features: int, *, separable: bool, inner_norm: bool, options: dict, rate: int = 1
) -> nnx.Module:
  """A 3x3 convolution of head or decoder; call it by `run_conv`.

  Args:
    separable: depthwise separable (arXiv 1802.02611, section 3.1), else dense.
    inner_norm: of a separable one, see `layers.SeparableConv`.
    options: norm, dtype, rngs.
  """
  if separable:
    return layers.SeparableConv(in_features, features, rate=rate, inner_norm=inner_norm, **SEPARABLE_INIT, **options)
  return layers.ConvNorm(in_features, features, 3, rate=rate, kernel_init=nnx.initializers.glorot_uniform(), **options)


def run_conv(conv: nnx.Module, x: jax.Array, train: bool, endpoints: dict, name: str) -> jax.Array:
  """[B, h, w, in] -> [B, h, w, features], also kept as the end point `name`."""
  separable = isinstance(conv, layers.SeparableConv)
  x = endpoints[name] = conv(x, train, endpoints, name) if separable else conv(x, train)
  return x


class ASPP(layers.Block):
  """Global mean pooling, a 1x1 convolution and 3x3 convolutions at several rates, joined by a 1x1 convolution.

  Args:
    in_features: channels of the backbone's features.
    rates: one branch each; () for none.
    separable: whether these are depthwise separable.
    image_pooling: whether there is a branch for the mean, over all pixels including padded ones.
    dropout: rate at the end.
    detail: separable_norm, separable_aspp, pooling_first, aspp_conv, head_features, projection_kernel.
    options: norm, dtype, rngs.
  """

  def __init__(self, in_features, *, rates, separable, image_pooling, dropout, detail: Details, options):
    width = detail.head_features
    dense = dict(kernel_init=nnx.initializers.glorot_uniform(), **options)
    conv = dict(inner_norm=detail.separable_norm, options=options)
    self.rates, self.pools, self.dropout = tuple(rates), image_pooling, dropout
    self.pooling_first = detail.pooling_first
    if image_pooling:
      self.pooling = layers.ConvNorm(in_features, width, **dense)
    self.branch0 = layers.ConvNorm(in_features, width, **dense)
    for n, rate in enumerate(rates, start=1):
      setattr(
        self,
        f"branch{n}",
        make_conv(in_features, width, separable=separable and detail.separable_aspp, rate=rate, **conv),
      )
    self.projection = layers.ConvNorm(
      (image_pooling + 1 + len(rates)) * width, width, detail.projection_kernel, **dense
    )
    self.conv = make_conv(width, width, separable=separable, **conv) if detail.aspp_conv else None

  @layers.rematerialized
  def __call__(self, x: jax.Array, train: bool, key: jax.Array | None, endpoints: dict) -> jax.Array:
    """[B, h, w, in] -> [B, h, w, head_features]."""
    branches = [self.branch0(x, train)]
    endpoints["aspp/branch0"] = branches[0]
    for n in range(1, len(self.rates) + 1):
      branches.append(run_conv(getattr(self, f"branch{n}"), x, train, endpoints, f"aspp/branch{n}"))
    if self.pools:
      pooled = endpoints["aspp/pooling"] = self.pooling(x.mean((1, 2), keepdims=True), train)  # [B, 1, 1, 256]
      # In the statistics' type, because the gradient is a reduction over all pixels.
      pooled = jnp.broadcast_to(pooled.astype(layers.param_dtype(x.dtype)), branches[0].shape).astype(x.dtype)
      branches.insert(0 if self.pooling_first else len(branches), pooled)
    x = endpoints["aspp/concat"] = jnp.concatenate(branches, axis=-1)
    x = endpoints["aspp/projection"] = self.projection(x, train)
    x = layers.dropout(x, self.dropout, key if train else None)
    return x if self.conv is None else run_conv(self.conv, x, train, endpoints, "aspp/conv")
