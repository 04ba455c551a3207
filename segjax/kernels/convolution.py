"""Dense convolution.

| platform | form | gain | measured by `python benchmarks/kernels.py` |
|---|---|---|---|
| cpu | a convolution of 1x1 as one product of all pixels | 1.03 in the step of Xception-65, whose temporary memory is 13 % less | --only=pointwise |
| cpu | fewer pixels than filters: products over patches | 146 times for an fc6 of 2048 filters | --only=fc6 |
| cpu | 3x3 of many features: Winograd's sums (winograd.py) | 1.5 times for 256 and 1024 features | --only=conv |
| cpu, split_cpu | feature maps computed before | 1.18 in the step of U-Net-16 | benchmarks/torch.md, "What is computed once" |
| gpu | 1x1: the kernel's gradient in the kernel's layout | 0.6 GB in a step of Xception-65 on H100 | benchmarks/accelerators.md, "What was tried" |

They can go when XLA:CPU is as fast, and when XLA:GPU updates a kernel in place by a gradient of another layout. What each brings to
whole steps on CPU is in benchmarks/kernels.md.

Cure, on every platform: the height of the map is split over all devices or none, see `sharding.split_height`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from segjax import kernels, sharding
from segjax.kernels import winograd

Padding = winograd.Padding
# So many multiplications saved for each number of the two feature maps outweigh what Winograd's transforms write: measured
# for 32 to 1024 features.
PAYS = 32
_ONE = dict(stride=1, rate=1, padding=((0, 0), (0, 0)))  # What a convolution of 1x1 does.


def conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding) -> jax.Array:
  """Convolution of [B, H, W, in] with [k, k, in, out], zeros around x; in x's type, which the kernel must have too.

  Args:
    stride, rate: same for height and width; rate is the dilation.
  """
  form = kernels.fastest(plain, cpu=_on_cpu, split_cpu=_on_split_cpu, gpu=_on_gpu)
  rows, (out_rows, _) = x.shape[1], output_size(x.shape[1:3], kernel.shape[0], stride, rate, padding)
  x = sharding.split_height(x, out_rows)
  if _is_pointwise(kernel, padding):
    x, stride = x[:, ::stride, ::stride], 1  # So that no gradient with zeros for the pixels between is written.
  y = form(x, kernel, stride=stride, rate=rate, padding=padding)
  return sharding.split_height(y, rows)


def _is_pointwise(kernel, padding: Padding) -> bool:
  return kernel.shape[0] == 1 and not any(map(any, padding))


def output_size(size: tuple[int, int], kernel_size: int, stride: int, rate: int, padding: Padding) -> tuple[int, int]:
  """(H, W) of what a convolution gives on a map of (H, W)."""
  reach = (kernel_size - 1) * rate
  return tuple((n + sum(pad) - reach - 1) // stride + 1 for n, pad in zip(size, padding))


def plain(x, kernel, *, stride, rate, padding):
  """As `conv`."""
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, rhs_dilation=(rate, rate), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _on_cpu(x, kernel, *, stride, rate, padding):
  if _is_pointwise(kernel, padding):
    return matmul(x, kernel[0, 0])
  options = dict(stride=stride, rate=rate, padding=padding)
  return _by_forms(x, kernel, _fast_forms(x, kernel, stride, rate, padding), tuple(options.items()))


def _on_split_cpu(x, kernel, **options):
  return _by_forms(x, kernel, XLA, tuple(options.items()))


def _on_gpu(x, kernel, **options):
  return _pointwise(x, kernel) if _is_pointwise(kernel, options["padding"]) else plain(x, kernel, **options)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[B, H, W, in] times [in, out] -> [B, H, W, out]: pixels as the rows of one matrix, which XLA:CPU multiplies fastest."""
  return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@jax.custom_vjp
def _pointwise(x, kernel):
  return plain(x, kernel, **_ONE)


def _pointwise_forward(x, kernel):
  return _pointwise(x, kernel), (x, kernel)


def _pointwise_backward(saved, g):
  """The kernel's gradient as that of a convolution from g to x, which cuDNN gives as [in, 1, 1, out], our layout.

  That from x to g it gives as [out, 1, 1, in]. XLA updates no kernel in place by what must be transposed: it copies the kernel
  and its momentum.
  """
  x, kernel = saved
  kernel_gradient = _kernel_gradient_by_xla(g, x, kernel=kernel.swapaxes(2, 3), **_ONE).swapaxes(2, 3)
  return _input_gradient(plain)(g, x=x, kernel=kernel, **_ONE), kernel_gradient


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


def _views(x, size: int, stride: int, rate: int, padding: Padding) -> list[jax.Array]:
  """For each tap of a kernel, row by row, what it looks at: size**2 of [B, H', W', in]."""
  h, w = output_size(x.shape[1:3], size, stride, rate, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  starts = [i * rate for i in range(size)]
  return [
    x[:, i : i + (h - 1) * stride + 1 : stride, j : j + (w - 1) * stride + 1 : stride] for i in starts for j in starts
  ]


class _Forms(NamedTuple):
  """One way to compute a convolution; each takes stride, rate and padding too."""

  forward: Callable  # (x, kernel)
  input_gradient: Callable  # (g, x=, kernel=): g is the gradient by the result; of x only the shape counts.
  kernel_gradient: Callable  # (x, g, kernel=): of the kernel only the shape counts.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_forms(x, kernel, forms: _Forms, options: tuple):
  return _after_maps(forms.forward, x, kernel, **dict(options))


def _forward(x, kernel, forms, options):
  return _by_forms(x, kernel, forms, options), (x, kernel)


def _backward(forms, options, saved, g):
  x, kernel = saved
  of_both = dict(options, kernel=kernel)
  return _after_maps(forms.input_gradient, g, x=x, **of_both), _after_maps(forms.kernel_gradient, x, g, **of_both)


_by_forms.defvjp(_forward, _backward)


def _after_maps(form: Callable, *maps, **options):
  """`form` of maps that are computed before.

  XLA would fuse what computes a map with the transposition that the kernel's gradient begins with, which then writes it
  three times as slowly.
  """
  return form(*jax.lax.optimization_barrier(maps), **options)


def _fast_forms(x, kernel, stride, rate, padding) -> _Forms:
  """Those that XLA:CPU runs fastest."""
  h, w = output_size(x.shape[1:3], kernel.shape[0], stride, rate, padding)
  pixels = x.shape[0] * h * w
  if pixels >= kernel.shape[-1] and _saved_by_winograd(x, kernel, stride, rate, padding) >= PAYS:
    return WINOGRAD
  # All patches take no more memory than the kernel, which is read in any case.
  return PATCHES if pixels <= kernel.shape[-1] else XLA


def _saved_by_winograd(x, kernel, stride, rate, padding) -> float:
  """Multiplications that Winograd's sums save for each number of the map and of the result; 0 where they do not apply."""
  size, _, of, to = kernel.shape
  applies = size == 3 and stride == rate == 1 and max(map(max, padding)) <= 2 and x.dtype != jnp.bfloat16
  return of * to / (of + to) if applies else 0.0


def _by_winograd(x, kernel, *, stride, rate, padding):
  return winograd.conv(x, kernel, padding)


def _input_gradient_by_winograd(g, *, x, kernel, stride, rate, padding):
  return winograd.input_gradient(g, kernel, padding)


def _over_patches(x, kernel, **options):
  """A convolution as one matrix product."""
  patches = jnp.concatenate(_views(x, kernel.shape[0], **options), axis=-1)
  return matmul(patches, kernel.reshape(-1, kernel.shape[-1]))


def _input_gradient(form):
  """That of a form which JAX transposes well."""
  return lambda g, *, x, kernel, **options: jax.linear_transpose(lambda x: form(x, kernel, **options), x)(g)[0]


def _kernel_gradient_by_xla(x, g, *, kernel, **options):
  return jax.linear_transpose(lambda kernel: plain(x, kernel, **options), kernel)(g)[0]


def _kernel_gradient_by_patches(x, g, *, kernel, **options):
  """The patches of all pixels, as rows, with g."""
  patches = jnp.concatenate(_views(x, kernel.shape[0], **options), axis=-1)
  patches, g = patches.reshape(-1, patches.shape[-1]), g.reshape(-1, g.shape[-1])
  total = jnp.matmul(patches.T, g, preferred_element_type=jnp.promote_types(g.dtype, jnp.float32))
  return total.reshape(kernel.shape).astype(kernel.dtype)


XLA = _Forms(plain, _input_gradient(plain), _kernel_gradient_by_xla)
PATCHES = _Forms(_over_patches, _input_gradient(_over_patches), _kernel_gradient_by_patches)
WINOGRAD = _Forms(_by_winograd, _input_gradient_by_winograd, _kernel_gradient_by_xla)
