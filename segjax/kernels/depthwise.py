"""Depthwise convolution: one filter for each channel.

| platform | form | gain | measured by `python benchmarks/kernels.py` |
|---|---|---|---|
| cpu | shifted products, added | 30 to 50 times forward | --only=depthwise |
| gpu | the same at rates and strides above 1 | not measured; cuDNN's grouped convolutions slow down with the rate; with a stride, 0.9 GB in a step of Xception-65 on H100 | --only=depthwise, and below |
| cpu | kernel's gradient by a loop over rows | 1.5 times beside autodiff of the shifted products | --only=depthwise |
| gpu | kernel's gradient as XLA's own, of each device's images | reads both maps once, not nine times | below |

They can go when XLA's grouped convolution is as fast, and its partitioner right. By the compiler's accounts of
benchmarks/accelerators.md, which also say why TPU has the plain form.

Cures, on every platform. The kernel's gradient is our own: XLA's partitioner multiplies that of a grouped convolution,
silently, by the size of each mesh axis over which the batch is replicated (jax 0.10.2 and 0.12.0.1). And the height of
the map is split over all devices or none, see `sharding.split_height`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from segjax import kernels, sharding
from segjax.kernels.convolution import Padding, output_size


class _Forms(NamedTuple):
  forward: Callable  # (x, kernel)
  kernel_gradient: Callable  # (x, g, kernel=): g is the gradient by the result; of the kernel only the shape counts.


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int, padding: Padding) -> jax.Array:
  """Convolves each channel with its own filter; the sum is in the kernel's type, the result in x's.

  Args:
    x: [B, H, W, C].
    kernel: [k, k, 1, C]; tap (i, j) of output pixel (p, q) looks at (p * stride + i * rate - top, ...).
    stride, rate: same for height and width; rate is the dilation.
    padding: zeros around x.
  """
  forms = kernels.fastest(PLAIN, cpu=ON_CPU, gpu=ON_GPU if rate == stride == 1 else ON_GPU_SHIFTED)
  rows, (out_rows, _) = x.shape[1], output_size(x.shape[1:3], kernel.shape[0], stride, rate, padding)
  y = _by_forms(sharding.split_height(x, out_rows), kernel, forms, stride, rate, padding)
  return sharding.split_height(y, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _by_forms(x, kernel, forms: _Forms, stride, rate, padding):
  return forms.forward(x, kernel, stride=stride, rate=rate, padding=padding)


def _forward(x, kernel, forms, stride, rate, padding):
  return _by_forms(x, kernel, forms, stride, rate, padding), (x, kernel)


def _backward(forms, stride, rate, padding, saved, g):
  x, kernel = saved
  kernel_gradient = forms.kernel_gradient(x, g, kernel=kernel, stride=stride, rate=rate, padding=padding)
  # The input gradient is a convolution of stride 1 with the filter turned by 180 degrees, over g with the zeros that
  # the stride left out put back. On the far side x may have pixels that no output pixel looked at.
  spread = ((0, 0, 0), *((0, 0, stride - 1),) * 2, (0, 0, 0))
  g = jax.lax.pad(g, jnp.zeros((), g.dtype), spread)
  reach = (kernel.shape[0] - 1) * rate
  back = tuple((reach - low, n + low - spread_n) for (low, _), n, spread_n in zip(padding, x.shape[1:3], g.shape[1:3]))
  return _by_forms(g, kernel[::-1, ::-1], forms, 1, rate, back), kernel_gradient


_by_forms.defvjp(_forward, _backward)


def _plain(x, kernel, *, stride, rate, padding):
  """One grouped convolution."""
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    (stride, stride),
    padding,
    rhs_dilation=(rate, rate),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


def _taps(x, kernel, stride, rate, padding):
  """x padded as far as needed, and for each tap that ever meets x (tap, its first row, its first column) in it.

  At large rates on small maps most taps see only padding (rate 18 on 5x5: all but the middle one); they are left out.
  """
  size = output_size(x.shape[1:3], kernel.shape[0], stride, rate, padding)
  starts = []  # Per axis: {tap index: first position looked at, in x's coordinates}, for taps that meet x.
  for n, out, (low, _) in zip(x.shape[1:3], size, padding):
    first = {i: i * rate - low for i in range(kernel.shape[0])}
    starts.append({i: p for i, p in first.items() if p < n and p + (out - 1) * stride >= 0})
  config, low = [(0, 0, 0)], []
  for n, out, first in zip(x.shape[1:3], size, starts):
    low.append(max([0, *(-p for p in first.values())]))
    config.append((low[-1], max([0, *(p + (out - 1) * stride + 1 - n for p in first.values())]), 0))
  padded = jax.lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
  taps = [((i, j), p + low[0], q + low[1]) for i, p in starts[0].items() for j, q in starts[1].items()]
  return padded, taps, size


def _shifted(x, kernel, *, stride, rate, padding):
  """The sum over taps of shifted copies of x times that tap's weights, which XLA:CPU fuses into one loop."""
  padded, taps, (h, w) = _taps(x, kernel, stride, rate, padding)
  total = jnp.zeros((x.shape[0], h, w, x.shape[-1]), kernel.dtype)
  for (i, j), row, col in taps:
    view = padded[:, row : row + (h - 1) * stride + 1 : stride, col : col + (w - 1) * stride + 1 : stride]
    total += view.astype(kernel.dtype) * kernel[i, j].reshape(1, 1, 1, -1)
  return total.astype(x.dtype)


def _kernel_gradient_by_sums(x, g, *, kernel, stride, rate, padding):
  """Per tap, the sum over batch and pixels of g times the shifted x.

  Rows are shifted before columns: split over devices, they are then exchanged once for all taps of a row.
  """
  padded, taps, (h, w) = _taps(x, kernel, stride, rate, padding)
  lines = {row: padded[:, row : row + (h - 1) * stride + 1 : stride] for row in {row for _, row, _ in taps}}
  lines = {row: sharding.split_height(line) for row, line in lines.items()}
  gradient = {}
  for tap, row, col in taps:
    view = lines[row][:, :, col : col + (w - 1) * stride + 1 : stride]
    gradient[tap] = (view.astype(kernel.dtype) * g.astype(kernel.dtype)).sum((0, 1, 2))
  return _assemble(gradient, kernel)


def _kernel_gradient_by_rows(x, g, *, kernel, stride, rate, padding):
  """The same as a loop over the rows of g, in one pass over both arrays.

  XLA:CPU sums over leading axes with strided reads and rereads x and g for every tap: 28 ms on 2x33x33x728, this 5.
  Batch and width stay until the end: a sum in the loop would halve the speed, and be a collective per row on a mesh.
  """
  padded, taps, (h, w) = _taps(x, kernel, stride, rate, padding)

  def add_row(sums, n):
    row_g = jax.lax.dynamic_index_in_dim(g, n, 1, keepdims=False).astype(kernel.dtype)  # [B, W', C]
    rows = {
      row: jax.lax.dynamic_index_in_dim(padded, row + n * stride, 1, keepdims=False).astype(kernel.dtype)
      for row in {row for _, row, _ in taps}
    }
    return {t: sums[t] + rows[row][:, col : col + (w - 1) * stride + 1 : stride] * row_g for t, row, col in taps}, None

  zero = jnp.zeros((x.shape[0], w, x.shape[-1]), kernel.dtype)
  sums, _ = jax.lax.scan(add_row, {tap: zero for tap, _, _ in taps}, jnp.arange(h))
  return _assemble({tap: total.sum((0, 1)) for tap, total in sums.items()}, kernel)


def _kernel_gradient_of_each_device(x, g, *, kernel, **options):
  """XLA's own, which is right on one device; so each takes its own images, and the results are added in float32.

  Args:
    x, g: split over `data` alone.
  """

  def of_images(x, g):
    return jax.linear_transpose(lambda kernel: _plain(x, kernel, **options), kernel)(g)[0]

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:  # The caller's arrays may be split in ways unknown here.
    return _kernel_gradient_by_sums(x, g, kernel=kernel, **options)
  images = PartitionSpec("data")
  add = lambda x, g: jax.lax.psum(of_images(x, g), "data")  # noqa: E731
  # Unchecked, as shard_map would add the results itself, before they are float32.
  return jax.shard_map(add, in_specs=(images, images), out_specs=PartitionSpec(), check_vma=False)(x, g)


def _assemble(gradient: dict, kernel):
  """{(i, j): [C]} -> [k, k, 1, C], zero for taps that see only padding."""
  zero, size = jnp.zeros(kernel.shape[-1], kernel.dtype), kernel.shape[0]
  stacked = jnp.stack([gradient.get((i, j), zero) for i in range(size) for j in range(size)])
  return stacked.reshape(kernel.shape)


PLAIN = _Forms(_plain, _kernel_gradient_by_sums)
ON_CPU = _Forms(_shifted, _kernel_gradient_by_rows)
ON_GPU = _Forms(_plain, _kernel_gradient_of_each_device)
ON_GPU_SHIFTED = _Forms(_shifted, _kernel_gradient_of_each_device)
