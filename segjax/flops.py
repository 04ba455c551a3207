"""Multiply-adds of a model, counted in what JAX would run."""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def multiply_adds(function: Callable, *args) -> int:
  """Multiply-adds of the convolutions and matrix products of `function(*args)`, as papers count them.

  A convolution counts every tap of every output pixel, padding included. What is element-wise, such as batch norm, is
  left out (0.2 % of Xception-65), and so is resizing, whose matrix product is a choice of ours: it multiplies zeros.
  A depthwise convolution counts as one, in whatever form it runs.

  Args:
    args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.
  """
  jitted = function if isinstance(function, jax.stages.Wrapped) else jax.jit(function)
  return _count(jitted.trace(*args).jaxpr.jaxpr)


def _count(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if "resize" in str(equation.source_info.name_stack):
      continue
    if name == "conv_general_dilated":
      kernel, dims = equation.invars[1].aval.shape, params["dimension_numbers"]
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[dims.rhs_spec[0]]
    elif name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(
        equation.invars[0].aval.shape[n] for n in contracted
      )
    elif name == "cond":  # The forms of several platforms: all compute the same, only one as a convolution.
      total += max(_count(branch.jaxpr) for branch in params["branches"])
    else:
      inner = [_count(sub) for sub in core.jaxprs_in_params(params)]
      total += sum(inner) * params.get("length", 1)  # A scan's body runs `length` times.
  return total
