"""The layers that all models share. NHWC; parameters in float32 (float64 under dtype float64), compute in `dtype`.

Mode is an argument of each call, never hidden state. Module attributes give parameters their names: `kernel`, `bias`,
`scale`; batch norm's running `mean` and `var` are `nnx.BatchStat`.
"""

import functools
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.kernels import batch_norm, conv_transpose, convolution, depthwise, max_pool
from segjax.models import resize

# Mean and standard deviation of ImageNet's training images, RGB in [0, 255], as commonly used.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

he_normal = nnx.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")  # He et al. 2015, equation 10.


def param_dtype(dtype) -> jnp.dtype:
  """Parameters and statistics stay in float32 under bfloat16 compute, and follow float64, which tests use."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


class Block(nnx.Module):
  """A module with methods that `rematerialized` decorates.

  Attributes:
    remat: whether the backward pass computes inner results again; `models.build` sets it.
  """

  remat = False


def rematerialized(call: Callable) -> Callable:
  """Decorates a method of a `Block`: under `remat` only its arguments are kept for the backward pass (arXiv 1604.06174).

  The method takes arrays, plain values and at most one dict of end points to fill, by position. Gradients are those
  without it, but for the rounding of another order; batch norm's running statistics are updated once.
  """

  @functools.wraps(call)
  def run(self, *arguments):
    if not self.remat:
      return call(self, *arguments)

    def pure(module, arrays):
      arrays, filled = iter(arrays), {}
      inner = (next(arrays) if isinstance(a, jax.Array) else filled if isinstance(a, dict) else a for a in arguments)
      return call(module, *inner), filled

    # Without graph_updates it returns the variables that changed alone, not every parameter.
    remat = nnx.remat(pure, graph_updates=False)
    result, filled = remat(self, [a for a in arguments if isinstance(a, jax.Array)])
    for endpoints in (a for a in arguments if isinstance(a, dict)):
      endpoints.update(filled)  # End points that nobody reads are not kept either.
    return result

  return run


def per_channel(variable: nnx.Variable) -> jax.Array:
  """[C] -> [1, 1, 1, C], to broadcast over [B, H, W, C] without implicit rank promotion."""
  return variable[...].reshape(1, 1, 1, -1)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
  """x [B, H, W, C] + bias [C], in x's type.

  Computed in the bias' type, and so is its gradient, a reduction over all pixels, which in bfloat16 would stall.
  """
  return (x.astype(bias.dtype) + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


def paddings(size: tuple[int, int], kernel_size: int, stride: int, rate: int, padding: str):
  """Zeros around a feature map before an unpadded convolution, ((top, bottom), (left, right)).

  Args:
    size: (H, W) of the feature map.
    padding: "same": TensorFlow's rule, as many as the ceil(n / stride) outputs need, so it depends on the size.
      "fixed": (kernel_size - 1) * rate whatever the stride and size. Both put the smaller half first, and agree at
      stride 1 and for odd sizes at stride 2; for even sizes "same" looks one pixel further down and right.
      "valid": none.
  """
  if padding == "valid":
    return ((0, 0), (0, 0))
  reach = (kernel_size - 1) * rate
  total = [reach if padding == "fixed" else max((-(-n // stride) - 1) * stride + reach + 1 - n, 0) for n in size]
  return tuple((t // 2, t - t // 2) for t in total)


class Conv(nnx.Module):
  """Dense convolution; n pixels become ceil(n / stride), or, with padding "valid", only those that need no padding.

  Args:
    in_features, out_features: channels.
    kernel_size: odd.
    stride, rate: in pixels; rate is the dilation.
    padding: "same", "fixed" or "valid", see `paddings`.
    use_bias: off where a batch norm follows, which would cancel it.
  """

  def __init__(
    self,
    in_features,
    out_features,
    kernel_size=3,
    *,
    stride=1,
    rate=1,
    padding="same",
    use_bias=False,
    kernel_init=he_normal,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    shape = (kernel_size, kernel_size, in_features, out_features)
    self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype(dtype)))
    self.bias = nnx.Param(jnp.zeros(out_features, param_dtype(dtype))) if use_bias else None
    self.stride, self.rate, self.padding, self.dtype = stride, rate, padding, dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, in] -> [B, ceil(H / stride), ceil(W / stride), out]."""
    x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
    padding = paddings(x.shape[1:3], kernel.shape[0], self.stride, self.rate, self.padding)
    x = convolution.conv(x, kernel, self.stride, self.rate, padding)
    return x if self.bias is None else add_bias(x, self.bias[...])


class DepthwiseConv(nnx.Module):
  """3x3 convolution of each channel with its own filter, without bias; arguments as of `Conv`.

  The parameter is called `depthwise_kernel`, [3, 3, 1, C], because weight decay leaves it alone (official DeepLab).
  """

  def __init__(
    self, features, *, stride=1, rate=1, padding="same", kernel_init=he_normal, dtype=jnp.float32, rngs: nnx.Rngs
  ):
    self.depthwise_kernel = nnx.Param(kernel_init(rngs.params(), (3, 3, 1, features), param_dtype(dtype)))
    self.stride, self.rate, self.padding, self.dtype = stride, rate, padding, dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C]."""
    padding = paddings(x.shape[1:3], 3, self.stride, self.rate, self.padding)
    return depthwise.depthwise_conv(x.astype(self.dtype), self.depthwise_kernel[...], self.stride, self.rate, padding)


class ConvTranspose2x2(nnx.Module):
  """Transposed convolution, kernel 2x2, stride 2 (the U-Net's "up-convolution").

  The kernel is [2, 2, in, out]: output pixel (2i+a, 2j+b) = x[i, j] @ kernel[a, b] + bias.
  """

  def __init__(self, in_features, out_features, *, dtype=jnp.float32, rngs: nnx.Rngs):
    # Each output pixel sees one input pixel, so the fan-in is in_features alone.
    kernel = he_normal(rngs.params(), (in_features, 4 * out_features), param_dtype(dtype))
    self.kernel = nnx.Param(kernel.reshape(in_features, 2, 2, out_features).transpose(1, 2, 0, 3))
    self.bias = nnx.Param(jnp.zeros(out_features, param_dtype(dtype)))
    self.dtype = dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, in] -> [B, 2H, 2W, out]."""
    x = conv_transpose.conv_transpose(x.astype(self.dtype), self.kernel[...].astype(self.dtype), 2)
    return add_bias(x, self.bias[...])


class ConvTranspose(nnx.Module):
  """Transposed convolution without bias whose kernel is twice its stride, as FCNs upsample their scores.

  Args:
    stride: the factor of upsampling.
    kernel_init: None: bilinear interpolation of each channel, which needs as many channels out as in.

  The kernel is [2 stride, 2 stride, in, out]: the output pixels stride * i + a take x[i] @ kernel[a].
  """

  def __init__(self, in_features, out_features, stride, *, kernel_init=None, dtype=jnp.float32, rngs: nnx.Rngs):
    shape = (2 * stride, 2 * stride, in_features, out_features)
    if kernel_init is None:
      line = jnp.asarray(resize.bilinear_filter(stride), param_dtype(dtype))
      plane = (line.reshape(-1, 1) * line.reshape(1, -1)).reshape(*shape[:2], 1, 1)
      self.kernel = nnx.Param(plane * jnp.eye(in_features, dtype=plane.dtype).reshape(1, 1, *shape[2:]))
    else:
      self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype(dtype)))
    self.stride, self.dtype = stride, dtype

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, in] -> [B, (H + 1) stride, (W + 1) stride, out]."""
    return conv_transpose.conv_transpose(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.stride)


def max_pool_2x2(x: jax.Array, ceil_mode: bool = False) -> jax.Array:
  """[B, H, W, C] -> [B, H/2, W/2, C]. Where values tie, the gradient is shared.

  Args:
    ceil_mode: an odd size is rounded up, its last window being half outside (Caffe's pooling). Off: refused.

  Raises:
    ValueError: an odd height or width without `ceil_mode`.
  """
  if ceil_mode and (x.shape[1] % 2 or x.shape[2] % 2):
    outside = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    x = jnp.pad(x, outside, constant_values=-jnp.inf)
  b, h, w, c = x.shape
  if h % 2 or w % 2:
    raise ValueError(f"max_pool_2x2 needs an even height and width, got {h}x{w}; pad the input to the model's stride.")
  return max_pool.max_pool_2x2(x)


def linear(x: jax.Array) -> jax.Array:
  """The identity, for a layer without an activation."""
  return x


class NoVariance(ValueError):
  """A batch norm in training sees one value of each channel."""


class BatchNorm(nnx.Module):
  """Batch normalisation (Ioffe & Szegedy 2015) over batch, height and width.

  Under jit with a sharded batch the means are global, so 1 device and 8 devices compute the same. Statistics are float32
  whatever the compute type, the variance about a mean: E[x^2] - E[x]^2 loses all digits where the mean is large.

  Args:
    momentum: share of the old running statistic kept at an update (PyTorch's momentum is 1 minus this).
    epsilon: added to the variance.
    frozen: use the running statistics in training too, and leave them alone; scale and bias still learn.

  The running variance takes the unbiased batch variance (N / (N - 1)), as TensorFlow's fused kernel and PyTorch do;
  the normalisation takes the biased one.

  Attributes:
    measures: whether, normalising by its running statistics, it leaves in their place those of its input, for
      `pretrained.unfold`.
  """

  measures = False

  def __init__(self, features, *, momentum=0.9, epsilon=1e-5, frozen=False, dtype=jnp.float32):
    self.scale = nnx.Param(jnp.ones(features, param_dtype(dtype)))
    self.bias = nnx.Param(jnp.zeros(features, param_dtype(dtype)))
    self.mean = nnx.BatchStat(jnp.zeros(features, param_dtype(dtype)))
    self.var = nnx.BatchStat(jnp.ones(features, param_dtype(dtype)))
    self.momentum, self.epsilon, self.frozen, self.dtype = momentum, epsilon, frozen, dtype

  def __call__(self, x: jax.Array, train: bool, activation: Callable = linear) -> jax.Array:
    """[B, H, W, C] -> the same, in `dtype`. With `train`, and unless frozen, by the batch's statistics, which update the
    running ones.

    Args:
      activation: of the result, elementwise.

    Raises:
      NoVariance: one image of one pixel, whose result would be `bias` whatever x is, while the running variance decays.
    """
    scale, bias = per_channel(self.scale), per_channel(self.bias)
    if train and not self.frozen:
      count = x.shape[0] * x.shape[1] * x.shape[2]
      if count == 1:
        raise NoVariance(f"Batch norm sees one value of each of {x.shape[-1]} channels in training: no variance.")
      y, mean, var = batch_norm.by_batch_statistics(x, scale, bias, self.epsilon, activation)
      for running, batch in ((self.mean, mean), (self.var, var * (count / (count - 1)))):
        # Not running[...] = ...: nnx then asks for shardings, and each tracer lists where it comes from: half of all tracing.
        running.set_value(self.momentum * running[...] + (1 - self.momentum) * batch.reshape(-1))
    else:
      mean, var = per_channel(self.mean), per_channel(self.var)
      y = activation(batch_norm.normalize(x, mean, var, scale, bias, self.epsilon))
      if self.measures:
        for running, batch in zip((self.mean, self.var), batch_norm.moments(x, scale.dtype)):
          running.set_value(batch.reshape(-1))
    return y.astype(self.dtype)


def freeze(network: nnx.Module, paths: Collection[str]) -> None:
  """Freezes the batch norms whose running statistics have these paths, as "backbone/norm1/mean"."""
  for parts, module in nnx.iter_modules(network):
    if isinstance(module, BatchNorm) and "/".join(map(str, (*parts, "mean"))) in paths:
      module.frozen = True


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes elements with probability `rate` and scales the others by 1 / (1 - rate). No key or rate 0: x itself."""
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def pad_to_multiple(x: jax.Array, multiple: int) -> jax.Array:
  """Zero-pads [B, H, W, C] at the bottom and right until H and W are multiples of `multiple`."""
  h, w = x.shape[1:3]
  return jnp.pad(x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)))


def standardize(image: jax.Array, mean: tuple, std: tuple) -> jax.Array:
  """(image - mean) / std per channel of [B, H, W, C]. The mean pixel, which pads crops, becomes exactly 0."""
  mean, std = (np.asarray(v, np.float32).reshape(1, 1, 1, -1) for v in (mean, std))
  return (image - mean) / std


class ConvNorm(nnx.Module):
  """Dense convolution without bias, batch norm, and an activation.

  Args:
    activation: of the result.
    norm: keywords of `BatchNorm`: momentum, epsilon, frozen.
    conv: further keywords of `Conv`: dtype, rngs, ....
  """

  def __init__(self, in_features, out_features, kernel_size=1, *, activation=jax.nn.relu, norm: dict, **conv):
    self.conv = Conv(in_features, out_features, kernel_size, **conv)
    self.norm = BatchNorm(out_features, dtype=self.conv.dtype, **norm)
    self.activation = activation

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return self.norm(self.conv(x), train, self.activation)


class SeparableConv(nnx.Module):
  """3x3 depthwise convolution, batch norm, 1x1 convolution, batch norm (arXiv 1802.02611, section 3.1).

  Args:
    inner_norm: off: no batch norm and no activation between the two convolutions.
    activation: after each of the two batch norms.
    norm: keywords of `BatchNorm`.
    kernel_init: of both convolutions.
    depthwise_init: of the depthwise one, in its place.
    depthwise: further keywords of `DepthwiseConv`: stride, rate, padding.
  """

  def __init__(
    self,
    in_features,
    out_features,
    *,
    inner_norm=True,
    activation=jax.nn.relu,
    norm: dict,
    kernel_init=he_normal,
    depthwise_init=None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
    **depthwise,
  ):
    options = dict(dtype=dtype, rngs=rngs)
    self.depthwise = DepthwiseConv(in_features, kernel_init=depthwise_init or kernel_init, **options, **depthwise)
    self.depthwise_norm = BatchNorm(in_features, dtype=dtype, **norm) if inner_norm else None
    self.pointwise = Conv(in_features, out_features, 1, kernel_init=kernel_init, **options)
    self.pointwise_norm = BatchNorm(out_features, dtype=dtype, **norm)
    self.activation = activation

  def __call__(self, x: jax.Array, train: bool, endpoints: dict, name: str) -> jax.Array:
    """[B, H, W, in] -> [B, H / stride, W / stride, out]; adds `name` and `name`/depthwise to `endpoints`."""
    x = self.depthwise(x)
    x = endpoints[f"{name}/depthwise"] = self.depthwise_norm(x, train, self.activation) if self.depthwise_norm else x
    x = endpoints[name] = self.pointwise_norm(self.pointwise(x), train, self.activation)
    return x
