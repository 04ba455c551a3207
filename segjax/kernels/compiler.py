"""What XLA is told when it compiles a step.

| platform | options | gain | measured by |
|---|---|---|---|
| cpu | libraries | 1.16 to 1.24 in U-Nets, 1.19 in evaluating Xception-65 | benchmarks/torch.md, "Whose convolutions and products" |
| cpu | barriers kept | 1.18 in U-Net-16 with the barriers of convolution.py and batch_norm.py | torch.md, "What is computed once" |

They can go when XLA:CPU's own choice of libraries is as fast, and when it keeps loops apart of itself.
"""

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
def options(kind: str, platform: str) -> dict[str, str]:
  """`compiler_options` of jax.jit: on CPU which libraries compute, and that optimization_barrier keeps loops apart.

  An XLA that does not know the choice of libraries, which is experimental, gets neither.

  Args:
    kind: of the step: "train" or "eval".
    platform: of `kernels.target`; others than "cpu" and "split_cpu" get none.
  """
  if platform not in ("cpu", "split_cpu"):
    return {}
  found = {"xla_cpu_experimental_ynn_fusion_type": _BY_YNNPACK[kind], "xla_disable_hlo_passes": _LEFT_OUT}
  on_cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  try:
    jax.jit(lambda: 0, out_shardings=on_cpu, compiler_options=found).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return found
