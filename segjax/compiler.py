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
# XLA:CPU's pass that takes optimization_barrier out, before loops are fused: it would not keep them apart.
_LEFT_OUT = "cse_barrier_expander"


@functools.cache
def options(kind: str) -> dict[str, str]:
  """`compiler_options` of jax.jit for JAX's default platform: on CPU which libraries compute, and
  that jax.lax.optimization_barrier keeps loops apart; elsewhere none.

  An XLA that does not know the choice of libraries, which is experimental, gets neither.

  Args:
    kind: of the step: "train" or "eval".
  """
  if jax.default_backend() != "cpu":
    return {}
  found = {"xla_cpu_experimental_ynn_fusion_type": _BY_YNNPACK[kind], "xla_disable_hlo_passes": _LEFT_OUT}
  try:
    jax.jit(lambda: 0, compiler_options=found).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return found
