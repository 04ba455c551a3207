"""What XLA is told when it compiles a step."""

import functools

import jax

# What XLA:CPU leaves to YNNPACK. By default that is convolutions too, for many of which YNNPACK uses one core only, and is
# several times slower at their kernels' gradients than Eigen; nor are an evaluation's products the better for it
# (benchmarks/kernels.md, torch.md).
_BY_YNNPACK = {
  "train": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE",
  "eval": "LIBRARY_FUSION_TYPE_REDUCE",
}


@functools.cache
def options(kind: str) -> dict[str, str]:
  """`compiler_options` of jax.jit for JAX's default platform: on CPU which libraries compute, elsewhere none.

  The option is experimental; an XLA that does not know it gets none.

  Args:
    kind: of the step: "train" or "eval".
  """
  if jax.default_backend() != "cpu":
    return {}
  found = {"xla_cpu_experimental_ynn_fusion_type": _BY_YNNPACK[kind]}
  try:
    jax.jit(lambda: 0, compiler_options=found).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return found
