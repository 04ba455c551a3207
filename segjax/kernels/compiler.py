"""What XLA is told when it compiles a step.

| platform | options | gain | measured by |
|---|---|---|---|
| cpu | libraries | 1.16 to 1.24 in U-Nets, 1.19 in evaluating Xception-65 | benchmarks/torch.md, "Whose convolutions and products" |
| gpu | rounds to bfloat16 where the program does | 106.7 -> 102.5 GB a step of Xception-65 on H100 | benchmarks/accelerators.md, "What was tried" |
| gpu | gradients' all-reduces of 8 MiB | six in U-Net-64's backward pass, as gradients come, instead of two at its end | benchmarks/accelerators.md, "What was tried" |
| cpu | barriers kept | 1.18 in U-Net-16 with the barriers of convolution.py and batch_norm.py | torch.md, "What is computed once" |

They can go when XLA:CPU's own choice of libraries is as fast, and when it keeps loops apart of itself; that of GPUs when a
measurement there shows it does not help. XLA makes collectives asynchronous there unasked; on TPU it leaves all of them
synchronous.
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
_ON_GPU = {
  # Bytes up to which all-reduces are joined. By default a network's gradients are one or two, which wait for the last.
  "xla_gpu_all_reduce_combine_threshold_bytes": "8388608",
  # Or XLA leaves out a rounding to bfloat16 and back, and writes the feature map in float32.
  "xla_allow_excess_precision": False,
}


@functools.cache
def options(kind: str, platform: str) -> dict[str, str | bool]:
  """`compiler_options` of jax.jit: on CPU which libraries compute, and that optimization_barrier keeps loops apart; on GPU
  which all-reduces become one, and that feature maps are rounded as they are written down.

  An XLA that does not know the choice of libraries, which is experimental, gets neither.

  Args:
    kind: of the step: "train" or "eval".
    platform: of `kernels.target`; others than those of CPUs and GPUs get none.
  """
  if platform in ("gpu", "split_gpu"):
    return _ON_GPU
  if platform not in ("cpu", "split_cpu"):
    return {}
  found = {"xla_cpu_experimental_ynn_fusion_type": _BY_YNNPACK[kind], "xla_disable_hlo_passes": _LEFT_OUT}
  on_cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  try:
    jax.jit(lambda: 0, out_shardings=on_cpu, compiler_options=found).lower().compile()
  except jax.errors.JaxRuntimeError:
    return {}
  return found
