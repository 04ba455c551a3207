"""The models by name."""

import jax.numpy as jnp
from flax import nnx

from segjax.models.base import Network
from segjax.models.deeplab import DeepLabV3Plus
from segjax.models.dilated_fcn import DilatedFCN
from segjax.models.fcn import FCN
from segjax.models.unet import UNet

MODELS = {"unet": UNet, "deeplab_v3plus": DeepLabV3Plus, "dilated_fcn": DilatedFCN, "fcn": FCN}


def build(name: str, *, num_classes: int, dtype="float32", remat: bool = False, rngs: nnx.Rngs, **options) -> Network:
  """Builds a model; call under `jax.jit` or `jax.eval_shape`, as eager initialisation takes seconds.

  Args:
    name: a key of `MODELS`.
    num_classes: channels of the logits.
    dtype: of the computation.
    remat: whether the backward pass computes the inner results of each block again instead of keeping them.
    options: of the model's constructor.

  Raises:
    ValueError: an unknown name (lists the known ones) or an option out of range.
  """
  if name not in MODELS:
    raise ValueError(f"model.name = {name!r}: choose one of {', '.join(MODELS)}.")
  model = MODELS[name](num_classes=num_classes, dtype=jnp.dtype(dtype), rngs=rngs, **options)
  if remat:
    model.set_attributes(remat=True)
  return model
