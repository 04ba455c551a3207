"""Multiply-adds of a model, counted in what JAX would run."""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def multiply_adds(function: Callable, *args) -> int:
  """Multiply-adds of the convolutions and matrix products of `function(*args)`, as papers count them.

  A convolution counts every tap of every output pixel, padding included, but not the zeros between the pixels of a
  transposed one. What is element-wise, such as batch norm, is
  left out (0.2 % of Xception-65), and so is resizing, whose matrix product is a choice of ours: it multiplies zeros.
  Forms of other kernels than the plain ones have other numbers (segjax/kernels).

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
      taps = math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[dims.rhs_spec[0]]
      total += taps // math.prod(params["lhs_dilation"])
    elif name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      total += math.prod(equation.outvars[0].aval.shape) * math.prod(
        equation.invars[0].aval.shape[n] for n in contracted
      )
    elif name == "cond":  # Only one branch runs.
      total += max(_count(branch.jaxpr) for branch in params["branches"])
    else:
      inner = [_count(sub) for sub in core.jaxprs_in_params(params)]
      total += sum(inner) * params.get("length", 1)  # A scan's body runs `length` times.
  return total
