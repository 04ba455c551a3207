"""The arithmetic of batch normalisation (Ioffe & Szegedy 2015); `layers.BatchNorm` has parameters and running statistics.

| platform | form | gain | measured by |
|---|---|---|---|
| cpu | a gradient of its own; sums of several maps in one loop | 1.13 in the step of Xception-65, 1.04 in U-Net-16's | benchmarks/torch.md, "One loop for batch norm" |

It can go when XLA:CPU fuses sums with what computes their maps. With ReLU, value and gradients, it takes a third to a half of
the plain form's time (`python benchmarks/kernels.py --only=norm`).
"""

import functools
import operator
from collections.abc import Callable

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
  return kernels.fastest(_plain, cpu=_in_few_loops)(x, scale, bias, epsilon, activation)


def _plain(x, scale, bias, epsilon, activation):
  x = x.astype(scale.dtype)
  mean = x.mean((0, 1, 2), keepdims=True)
  var = jnp.square(x - mean).mean((0, 1, 2), keepdims=True)
  return activation(normalize(x, mean, var, scale, bias, epsilon)), mean, var


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _in_few_loops(x, scale, bias, epsilon, activation):
  """Here the statistics have no gradients of their own.

  Autodiff would take twice as many sums for the gradient, and keep x - mean beside x: with ReLU 2 to 3 times the time.
  """
  mean, var = _moments_in_one_loop(x.astype(scale.dtype))
  return activation(normalize(x, mean, var, scale, bias, epsilon)), mean, var


def _forward(x, scale, bias, epsilon, activation):
  results = _in_few_loops(x, scale, bias, epsilon, activation)
  return results, (x, scale, bias, *results[1:])


def _backward(epsilon, activation, saved, gradients):
  x, scale, bias, mean, var = saved
  inverse = jax.lax.rsqrt(var + epsilon)

  def normal_and_gradient(x, g):
    _, gradient = jax.vjp(activation, normalize(x, mean, var, scale, bias, epsilon))
    return (x.astype(scale.dtype) - mean) * inverse, *gradient(g)

  # Computed for the sums, and again with them: without the barriers XLA would do it once, and write it all to memory.
  x, g = jax.lax.optimization_barrier((x, gradients[0]))
  normal, gradient = normal_and_gradient(x, g)
  bias_gradient, scale_gradient = _sums_in_one_loop(gradient, gradient * normal)
  count = x.shape[0] * x.shape[1] * x.shape[2]
  normal, gradient = normal_and_gradient(*jax.lax.optimization_barrier((x, g)))
  input_gradient = scale * inverse * (gradient - bias_gradient / count - normal * (scale_gradient / count))
  return input_gradient.astype(x.dtype), scale_gradient, bias_gradient


_in_few_loops.defvjp(_forward, _backward)


def _moments_in_one_loop(x):
  """Mean and variance, [1, 1, 1, C] each, reading x once: of each example about the mean of its middle row, and then of all (Chan et al. 1979).

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
  """Of each [B, H, W, C] over all pixels: [1, 1, 1, C]."""
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
