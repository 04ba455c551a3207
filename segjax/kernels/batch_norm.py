"""The arithmetic of batch normalisation (Ioffe & Szegedy 2015); `layers.BatchNorm` has parameters and running statistics.

| platform | form | gain | measured by |
|---|---|---|---|
| gpu, tpu | a gradient of its own, which keeps x alone | Xception-65 keeps 602 MiB for the backward pass, not 1285, in bfloat16 | below |
| cpu | that, and sums of several maps in one loop | 1.13 in the step of Xception-65, 1.04 in U-Net-16's | benchmarks/torch.md, "One loop for batch norm" |

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

from segjax import kernels


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
    (activation(normalised), mean, variance), in the type of `scale`; the statistics are [1, 1, 1, C].
  """
  forms = dict.fromkeys(("gpu", "tpu", "split_gpu", "split_tpu", "split_cpu"), functools.partial(_own_gradient, WHOLE))
  form = kernels.fastest(_plain, cpu=functools.partial(_own_gradient, IN_ONE_LOOP), **forms)
  return form(x, scale, bias, epsilon, activation)


def _plain(x, scale, bias, epsilon, activation):
  mean, var = moments(x.astype(scale.dtype))
  return activation(normalize(x, mean, var, scale, bias, epsilon)), mean, var


class _Sums(NamedTuple):
  moments: Callable  # x -> (mean, variance)
  sums: Callable  # maps -> sum of each
  apart: Callable  # maps -> the same, which XLA computes anew from here on


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def _own_gradient(by: _Sums, x, scale, bias, epsilon, activation):
  """Here the statistics have no gradients of their own.

  Autodiff would take twice as many sums for the gradient, and keep x - mean beside x.
  """
  mean, var = by.moments(x.astype(scale.dtype))
  return activation(normalize(x, mean, var, scale, bias, epsilon)), mean, var


def _forward(by, x, scale, bias, epsilon, activation):
  results = _own_gradient(by, x, scale, bias, epsilon, activation)
  return results, (x, scale, bias, *results[1:])


def _backward(by, epsilon, activation, saved, gradients):
  x, scale, bias, mean, var = saved
  inverse = jax.lax.rsqrt(var + epsilon)

  def normal_and_gradient(x, g):
    _, gradient = jax.vjp(activation, normalize(x, mean, var, scale, bias, epsilon))
    return (x.astype(scale.dtype) - mean) * inverse, *gradient(g)

  # Computed for the sums, and again with them: not apart, XLA:CPU would do it once, and write it all to memory.
  x, g = by.apart((x, gradients[0]))
  normal, gradient = normal_and_gradient(x, g)
  bias_gradient, scale_gradient = by.sums(gradient, gradient * normal)
  count = x.shape[0] * x.shape[1] * x.shape[2]
  normal, gradient = normal_and_gradient(*by.apart((x, g)))
  input_gradient = scale * inverse * (gradient - bias_gradient / count - normal * (scale_gradient / count))
  return input_gradient.astype(x.dtype), scale_gradient, bias_gradient


_own_gradient.defvjp(_forward, _backward)


def moments(x):
  """Mean and variance of [B, H, W, C] over all pixels: [1, 1, 1, C] each."""
  mean = x.mean((0, 1, 2), keepdims=True)
  return mean, jnp.square(x - mean).mean((0, 1, 2), keepdims=True)


def _sums(*maps):
  """Of each [B, H, W, C] over all pixels: [1, 1, 1, C]."""
  return tuple(x.sum((0, 1, 2), keepdims=True) for x in maps)


def _moments_in_one_loop(x):
  """The same, reading x once: of each example about the mean of its middle row, and then of all (Chan et al. 1979).

  A row is 1/h of the pixels, so the square of its mean's distance from theirs, which is cancelled, is at most h variances.
  """
  b, h, w, c = x.shape
  middle = x[:, h // 2].mean(1)
  offset = x - middle.reshape(b, 1, 1, c)
  first, second = (total / (h * w) for total in _sums_of_examples(offset, jnp.square(offset)))
  means = middle + first
  mean = means.mean(0, keepdims=True)
  var = (second - jnp.square(first) + jnp.square(means - mean)).mean(0)
  return mean.reshape(1, 1, 1, c), var.reshape(1, 1, 1, c)


def _sums_in_one_loop(*maps):
  """The same by `_sums_of_examples`."""
  return tuple(total.sum(0).reshape(1, 1, 1, -1) for total in _sums_of_examples(*maps))


def _sums_of_examples(*maps):
  """Of each [B, H, W, C] over height and width: [B, C]. First over 16 pixels at a time, of all maps together: one loop that
  computes them and writes none of them.

  A sum over all pixels XLA:CPU leaves to a library, which reads its map from memory.
  """
  b, h, w, c = maps[0].shape
  groups = h * w // 16
  maps = [x.reshape(b, h * w, c) for x in maps]
  grouped = [x[:, : 16 * groups].reshape(b, groups, 16, c) for x in maps]
  zeros = tuple(jnp.zeros((), x.dtype) for x in maps)
  sums = jax.lax.reduce(tuple(grouped), zeros, lambda a, b: tuple(map(operator.add, a, b)), (2,))
  return tuple(total.sum(1) + x[:, 16 * groups :].sum(1) for total, x in zip(sums, maps))


WHOLE = _Sums(moments, _sums, lambda maps: maps)
IN_ONE_LOOP = _Sums(_moments_in_one_loop, _sums_in_one_loop, jax.lax.optimization_barrier)
