"""What XLA is told when it compiles a step."""

import functools

import jax

# XLA:CPU has two libraries for convolutions. The one it takes by itself, YNNPACK, leaves all but one core idle for many
# shapes, and is 3 to 10 times slower at the gradients of kernels (benchmarks/kernels.md). It keeps products and sums.
_LIBRARIES = "xla_cpu_experimental_ynn_fusion_type"
_ON_CPU = {_LIBRARIES: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def options() -> dict[str, str]:
  """`compiler_options` of jax.jit for JAX's default platform; the options are experimental, so none that XLA does not know."""
  if jax.default_backend() != "cpu":
    return {}
  try:
    jax.jit(lambda: 0, compiler_options=_ON_CPU).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return _ON_CPU
