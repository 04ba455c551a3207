"""Dense convolutions, with the forms that XLA:CPU runs fast; other platforms have libraries for them.

XLA:CPU has one fast convolution, the forward one on maps of many pixels. Kernel gradients it turns into convolutions with
kernels as large as the map, after transposing both maps: 4x256x256x64 with 64 filters of 3x3 takes 1.6 s with both gradients,
and 0.1 forward; here they are matrix products over patches, 0.45 s with both. Where there are fewer pixels than filters everything is a
matrix product over patches, and a convolution of 1x1 is one on every platform. Between these, with many features, 3x3 needs half
the multiplications (winograd.py). All figures are in benchmarks/kernels.md.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from segjax import sharding
from segjax.models import winograd

Padding = winograd.Padding
CACHED = 2**20  # Numbers in a map that is still in the cache when it is read again.
LARGE_KERNEL = 2**20  # Elements from which adding to the gradient once for each row costs more than reading x again.


def conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding) -> jax.Array:
  """Convolution of [B, H, W, in] with [k, k, in, out], zeros around x; in x's type, which the kernel must have too.

  Args:
    stride, rate: same for height and width; rate is the dilation.
  """
  if kernel.shape[0] == 1:
    x = jnp.pad(x, ((0, 0), *padding, (0, 0))) if any(map(any, padding)) else x
    return matmul(x[:, ::stride, ::stride], kernel[0, 0])
  return _conv(x, kernel, stride, rate, padding)


def output_size(size: tuple[int, int], kernel_size: int, stride: int, rate: int, padding: Padding) -> tuple[int, int]:
  """(H, W) of what a convolution gives on a map of (H, W)."""
  reach = (kernel_size - 1) * rate
  return tuple((n + sum(pad) - reach - 1) // stride + 1 for n, pad in zip(size, padding))


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[B, H, W, in] times [in, out] -> [B, H, W, out]: pixels as the rows of one matrix, which XLA:CPU multiplies fastest.

  Not where rows of pixels are split over devices, which would have to exchange them to make one matrix.
  """
  if sharding.splits_height():
    return jnp.einsum("bhwi,io->bhwo", x, kernel)
  return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _views(x, size: int, stride: int, rate: int, padding: Padding) -> list[jax.Array]:
  """For each tap of a kernel, row by row, what it looks at: size**2 of [B, H', W', in]."""
  h, w = output_size(x.shape[1:3], size, stride, rate, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  starts = [i * rate for i in range(size)]
  return [
    x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride] for i in starts for j in starts
  ]


def on_cpu(form) -> dict:
  """{"cpu": form}, unless rows of pixels are split over devices: there each shift would be an exchange of rows of its own,
  with a copy of the map, and a loop over rows would gather them all.
  """
  return {} if sharding.splits_height() else dict(cpu=form)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, stride, rate, padding):
  options = dict(stride=stride, rate=rate, padding=padding)
  forms = on_cpu(functools.partial(_fast_forms(x, kernel, **options).forward, **options))
  return jax.lax.platform_dependent(x, kernel, **forms, default=functools.partial(_xla, **options))


def _forward(x, kernel, stride, rate, padding):
  return _conv(x, kernel, stride, rate, padding), (x, kernel)


def _backward(stride, rate, padding, saved, g):
  x, kernel = saved
  options = dict(stride=stride, rate=rate, padding=padding)
  fast = _fast_forms(x, kernel, **options)
  to_input = jax.lax.platform_dependent(
    g,
    **on_cpu(functools.partial(fast.input_gradient, x=x, kernel=kernel, **options)),
    default=functools.partial(_input_gradient(_xla), x=x, kernel=kernel, **options),
  )
  to_kernel = jax.lax.platform_dependent(
    x,
    g,
    **on_cpu(functools.partial(fast.kernel_gradient, kernel=kernel, **options)),
    default=functools.partial(_kernel_gradient_by_xla, kernel=kernel, **options),
  )
  return to_input, to_kernel


_conv.defvjp(_forward, _backward)


class _Forms(NamedTuple):
  """One way to compute a convolution; each takes stride, rate and padding too."""

  forward: Callable  # (x, kernel)
  input_gradient: Callable  # (g, x=, kernel=): g is the gradient by the result; of x only the shape counts.
  kernel_gradient: Callable  # (x, g, kernel=): of the kernel only the shape counts.


def _fast_forms(x, kernel, stride, rate, padding) -> _Forms:
  """Those that XLA:CPU runs fastest."""
  h, w = output_size(x.shape[1:3], kernel.shape[0], stride, rate, padding)
  pixels = x.shape[0] * h * w
  loops = kernel.size < LARGE_KERNEL and not sharding.splits_batch()  # Else each turn would be a collective.
  kernel_gradient = _kernel_gradient_by_rows if loops else _kernel_gradient_by_taps
  if _winograd_pays(x, kernel, pixels, stride, rate, padding):
    by_sums = kernel_gradient if sharding.splits_batch() else _kernel_gradient_by_winograd
    return _Forms(_by_winograd, _input_gradient_by_winograd, by_sums)
  if pixels <= kernel.shape[-1]:  # So that all patches take no more memory than the kernel, which is read in any case.
    return _Forms(_over_patches, _input_gradient(_over_patches), _kernel_gradient_by_patches)
  return _Forms(_xla, _input_gradient(_xla), kernel_gradient)


def _winograd_pays(x, kernel, pixels, stride, rate, padding) -> bool:
  """Whether the multiplications it saves take longer than reading and writing its sums, of the map and of the kernel."""
  size, _, of, to = kernel.shape
  saved = of * to / (of + to)  # Multiplications for each number of the map and of the result.
  applies = size == 3 and stride == rate == 1 and max(map(max, padding)) <= 2 and x.dtype != jnp.bfloat16
  return applies and pixels >= to and saved >= (80 if x.size > CACHED else 32)


def _by_winograd(x, kernel, *, stride, rate, padding):
  return winograd.conv(x, kernel, padding)


def _input_gradient_by_winograd(g, *, x, kernel, stride, rate, padding):
  return winograd.input_gradient(g, kernel, padding)


def _kernel_gradient_by_winograd(x, g, *, kernel, stride, rate, padding):
  return winograd.kernel_gradient(x, g, padding)


def _xla(x, kernel, *, stride, rate, padding):
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, rhs_dilation=(rate, rate), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _over_patches(x, kernel, **options):
  """A convolution as one matrix product."""
  patches = jnp.concatenate(_views(x, kernel.shape[0], **options), axis=-1)
  return matmul(patches, kernel.reshape(-1, kernel.shape[-1]))


def _input_gradient(form):
  """That of a form which JAX differentiates well."""
  return lambda g, *, x, kernel, **options: jax.vjp(lambda x: form(x, kernel, **options), x)[1](g)[0]


def _kernel_gradient_by_xla(x, g, *, kernel, **options):
  return jax.vjp(lambda kernel: _xla(x, kernel, **options), kernel)[1](g)[0]


def _kernel_gradient_by_patches(x, g, *, kernel, **options):
  """The patches of all pixels, as rows, with g."""
  patches = jnp.concatenate(_views(x, kernel.shape[0], **options), axis=-1)
  total = _gram(patches.reshape(-1, patches.shape[-1]), g.reshape(-1, g.shape[-1]))
  return total.reshape(kernel.shape).astype(kernel.dtype)


def _kernel_gradient_by_taps(x, g, *, kernel, **options):
  """For each tap the product of what it looked at, pixels as rows, with g."""
  rows = g.reshape(-1, g.shape[-1])
  taps = [_gram(view.reshape(-1, x.shape[-1]), rows) for view in _views(x, kernel.shape[0], **options)]
  return jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


def _kernel_gradient_by_rows(x, g, *, kernel, stride, rate, padding):
  """A loop over the rows of g, each multiplied with its pixels' patches of x, which stay in the cache."""
  size, (b, h, w, out) = kernel.shape[0], g.shape
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

  def add_row(total, n):
    row = jax.lax.dynamic_index_in_dim(g, n, 1, keepdims=False).reshape(b * w, out)
    lines = [
      jax.lax.dynamic_index_in_dim(padded, n * stride + i * rate, 1, keepdims=False) for i in range(size)
    ]  # [B, W + padding, in] each
    starts = [j * rate for j in range(size)]
    patches = jnp.concatenate([line[:, j : j + (w - 1) * stride + 1 : stride] for line in lines for j in starts], -1)
    return total + _gram(row, patches.reshape(b * w, -1)), None

  # [out, patch], not the other way round: XLA:CPU copies the left factor of such a product, so it had better be the small.
  nothing = jnp.zeros((out, kernel.size // out), jnp.promote_types(x.dtype, jnp.float32))
  total, _ = jax.lax.scan(add_row, nothing, jnp.arange(h))
  return total.T.reshape(kernel.shape).astype(kernel.dtype)


def _gram(a, b):
  """a^T b, summed in float32 at least."""
  return jnp.matmul(a.T, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
