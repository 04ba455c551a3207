"""The arithmetic of batch normalisation (Ioffe & Szegedy 2015); `layers.BatchNorm` has parameters and running statistics.

| platform | form | gain | measured by |
|---|---|---|---|
| gpu, tpu | a gradient of its own, which keeps x alone | Xception-65 keeps 602 MiB for the backward pass, not 1285, in bfloat16 | below |
| gpu, cpu | one reading of x and one collective for both moments | Xception-65 146.4 -> 140.5 GB a step on H100; U-Net-64 56 -> 38 collectives | benchmarks/accelerators.md, "What was tried" |
| cpu | all that, and sums of several maps in one loop | 1.13 in the step of Xception-65, 1.04 in U-Net-16's | benchmarks/torch.md, "One loop for batch norm" |

The loops can go when XLA:CPU fuses sums with what computes their maps. With ReLU, value and gradients, they take a third to a
half of the plain form's time (`python benchmarks/kernels.py --only=norm`). What is kept is counted by `residual_bytes` of
tests/test_memory.py, for two images of 257x257; how much of it XLA would compute again unasked was not measured.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from segjax import kernels, sharding


def normalize(x: jax.Array, mean, var, scale, bias, epsilon: float) -> jax.Array:
  """x [B, H, W, C] in the type of `scale`, by statistics, scale and bias [1, 1, 1, C]."""
  # The mean comes off first: folded into the shift, it would cost the digits by which it exceeds the deviation.
  return (x.astype(scale.dtype) - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias


def by_batch_statistics(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, activation: Callable):
  """Normalises [B, H, W, C] by its own statistics over batch, height and width.

  Args:
    scale, bias: [1, 1, 1, C].
    activation: of the result, a function of each number.

  Returns:
    (activation(normalised), mean, variance): the first in the type of x, so that its cotangent is; the statistics
    [1, 1, 1, C] in that of `scale`.
  """
  own = {platform: functools.partial(_own_gradient, form) for platform, form in _FORMS.items()}
  return kernels.fastest(_plain, **own)(x, scale, bias, epsilon, activation)


def _plain(x, scale, bias, epsilon, activation):
  mean, var = moments(x, scale.dtype)
  return activation(normalize(x, mean, var, scale, bias, epsilon)).astype(x.dtype), mean, var


class _Form(NamedTuple):
  moments: Callable  # (x, their type) -> (mean, variance)
  sums: Callable  # feature maps -> sum of each over all pixels
  apart: Callable  # feature maps -> the same, which XLA computes anew from here on


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _own_gradient(form: _Form, x, scale, bias, epsilon, activation):
  """Here the statistics have no gradients of their own.

  Autodiff would take twice as many sums for the gradient, and keep x - mean beside x.
  """
  mean, var = form.moments(x, scale.dtype)
  return activation(normalize(x, mean, var, scale, bias, epsilon)).astype(x.dtype), mean, var


def _forward(form, x, scale, bias, epsilon, activation):
  results = _own_gradient(form, x, scale, bias, epsilon, activation)
  return results, (x, scale, bias, *results[1:])


def _backward(form, epsilon, activation, saved, cotangents):
  x, scale, bias, mean, var = saved
  inverse = jax.lax.rsqrt(var + epsilon)

  def normal_and_gradient(x, g):
    _, gradient = jax.vjp(activation, normalize(x, mean, var, scale, bias, epsilon))
    return (x.astype(scale.dtype) - mean) * inverse, *gradient(g.astype(scale.dtype))

  # Computed for the sums, and again with them: not apart, XLA:CPU would do it once, and write it all to memory.
  x, g = form.apart((x, cotangents[0]))
  normal, gradient = normal_and_gradient(x, g)
  bias_gradient, scale_gradient = form.sums(gradient, gradient * normal)
  count = x.shape[0] * x.shape[1] * x.shape[2]
  normal, gradient = normal_and_gradient(*form.apart((x, g)))
  input_gradient = scale * inverse * (gradient - bias_gradient / count - normal * (scale_gradient / count))
  return input_gradient.astype(x.dtype), scale_gradient, bias_gradient


_own_gradient.defvjp(_forward, _backward)


def moments(x, dtype):
  """Mean and variance of [B, H, W, C] over all pixels, in `dtype`: [1, 1, 1, C] each."""
  x = x.astype(dtype)
  mean = x.mean((0, 1, 2), keepdims=True)
  return mean, jnp.square(x - mean).mean((0, 1, 2), keepdims=True)


def _sums(*maps):
  """Of each [B, H, W, C] over all pixels: [1, 1, 1, C]."""
  return tuple(x.sum((0, 1, 2), keepdims=True) for x in maps)


def _moments_in_one_pass(sums_of_examples, x, dtype):
  """The same as `moments`, reading x once, with one collective: of each example about the mean of its middle row, then of all
  that a device has, then of all devices' (Chan et al. 1979).

  A row is 1/h of the pixels, so the square of its mean's distance from theirs, which is cancelled, is at most h variances.
  """
  (b, h, w, c), data = x.shape, sharding.batch_parts()
  middle = x[:, h // 2].astype(dtype).mean(1)
  typed, about = x.astype(dtype), middle.reshape(b, 1, 1, c)
  # Two offsets, which XLA does not know for one: what both sums share XLA:GPU writes to memory where the map is small.
  first, second = (total / (h * w) for total in sums_of_examples(typed - about, jnp.square(about - typed)))
  examples = (part.reshape(data, b // data, c) for part in (middle + first, second - jnp.square(first)))
  devices = jnp.stack(_merged(*examples, 1))  # [2, data, 1, C]
  mean, var = _merged(*(sharding.on_all(devices) if data > 1 else devices), 0)
  return mean.reshape(1, 1, 1, c), var.reshape(1, 1, 1, c)


def _merged(mean, var, axis):
  """Mean and variance of groups of one size together."""
  whole = mean.mean(axis, keepdims=True)
  return whole, (var + jnp.square(mean - whole)).mean(axis, keepdims=True)


def _sums_of_examples(*maps):
  """Of each [B, H, W, C] over height and width: [B, C]."""
  return tuple(x.sum((1, 2)) for x in maps)


def _sums_in_one_loop(*maps):
  """`_sums` by one loop."""
  return tuple(total.sum(0).reshape(1, 1, 1, -1) for total in _sums_of_examples_in_one_loop(*maps))


def _sums_of_examples_in_one_loop(*maps):
  """`_sums_of_examples`, first over 16 pixels at a time, of all maps together: one loop that computes them and writes none
  of them.

  A sum over all pixels XLA:CPU leaves to a library, which reads its map from memory.
  """
  b, h, w, c = maps[0].shape
  groups = h * w // 16
  maps = [x.reshape(b, h * w, c) for x in maps]
  grouped = [x[:, : 16 * groups].reshape(b, groups, 16, c) for x in maps]
  zeros = tuple(jnp.zeros((), x.dtype) for x in maps)
  sums = jax.lax.reduce(tuple(grouped), zeros, lambda a, b: tuple(map(operator.add, a, b)), (2,))
  return tuple(total.sum(1) + x[:, 16 * groups :].sum(1) for total, x in zip(sums, maps))


# Not on TPU: there U-Net-64's step moved a quarter more memory by it (benchmarks/accelerators.md, "What was tried"). Nor where
# the height is split, where the middle row would be a collective more.
_IN_TWO_PASSES = _Form(moments, _sums, lambda maps: maps)
_FORMS = {
  "gpu": _Form(functools.partial(_moments_in_one_pass, _sums_of_examples), _sums, lambda maps: maps),
  "cpu": _Form(
    functools.partial(_moments_in_one_pass, _sums_of_examples_in_one_loop),
    _sums_in_one_loop,
    jax.lax.optimization_barrier,
  ),
  **dict.fromkeys(("tpu", "split_gpu", "split_tpu", "split_cpu"), _IN_TWO_PASSES),
}
