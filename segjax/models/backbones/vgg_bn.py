"""VGG-16 (Simonyan & Zisserman 2015, arXiv 1409.1556, table 1, D) with batch norm, without its fully connected layers.

The paper has no batch norm; torchvision's weights of that name (`vgg16_bn`) have one after each convolution.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from segjax.models import base, layers
from segjax.models.backbones.vgg import STAGES
from segjax.models.deeplab_details import Details


class VGG16BN(base.Backbone, layers.Block):
  """conv1_1 ... conv5_3, each with bias, batch norm and ReLU; a 2x2 pooling after each stage.

  Args:
    output_stride: 8, 16 or 32. Poolings beyond it are left out, and what is behind them is dilated.
    multi_grid: it has none: (1, 1, 1).
    detail: none of its fields.
    bn_momentum, frozen_bn: of batch norm.
    channels: of the image.

  The features of a stride are those before the next pooling; of stride 32 there is the last pooling's result alone.

  Raises:
    ValueError: another multi-grid.
  """

  normalization = "imagenet"
  ends_pooled = True

  def __init__(
    self,
    *,
    output_stride,
    multi_grid,
    detail: Details,
    bn_momentum,
    frozen_bn,
    channels=3,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if multi_grid != (1, 1, 1):
      raise ValueError(f"model.multi_grid = {multi_grid!r}: vgg16_bn has none, leave it at (1, 1, 1).")
    norm = dict(momentum=bn_momentum, frozen=frozen_bn)
    self.output_stride = output_stride
    self.pyramid = {2**n: (f"stage{n + 1}", 64 * STAGES[n][1]) for n in range(1, 5)} | {32: ("pool5", 512)}
    self.low_levels = {"stage3": 256}
    below = channels
    for stage, (count, factor) in enumerate(STAGES, start=1):
      rate = max(2 ** (stage - 1) // output_stride, 1)
      for n in range(1, count + 1):
        conv = layers.ConvNorm(below, 64 * factor, 3, rate=rate, use_bias=True, norm=norm, dtype=dtype, rngs=rngs)
        setattr(self, f"conv{stage}_{n}", conv)
        below = 64 * factor

  def __call__(self, image: jax.Array, train: bool, endpoints: dict, key: jax.Array | None = None) -> jax.Array:
    """Image [B, H, W, 3] -> features [B, H / output_stride, W / output_stride, 512], rounded up at each pooling."""
    x = image
    for stage in range(1, len(STAGES) + 1):
      x = endpoints[f"stage{stage}"] = self._stage(x, stage, train)
      x = layers.max_pool_2x2(x, ceil_mode=True) if 2**stage <= self.output_stride else x
    endpoints["pool5"] = x
    return x

  @layers.rematerialized
  def _stage(self, x, stage, train):
    for n in range(1, STAGES[stage - 1][0] + 1):
      x = getattr(self, f"conv{stage}_{n}")(x, train)
    return x
