"""Accelerators that a step can be compiled for, whether they are there or not, and what is known of them."""

import importlib.metadata
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from segjax.config import ConfigError

HERE = "here"


class Accelerator(NamedTuple):
  """Facts of one device.

  Attributes:
    kinds: `device_kind` of its JAX devices; the first is that of a described one.
    memory: bytes.
    bandwidth: of that memory, bytes/s.
    flops: {type: peak FLOP/s of dense matrix products}; of "f32" at JAX's default precision (TF32 on GPU, one product of
      bfloat16 on TPU), and of "f32 highest".
    source: of these.
  """

  kinds: tuple[str, ...]
  memory: int
  bandwidth: float
  flops: dict[str, float]
  source: str


def _gpu(kind: str, memory: int, bandwidth: float, bf16: float, tf32: float, f32: float, source: str) -> Accelerator:
  # The tensor cores multiply float64 as fast as the other cores float32.
  flops = {"bf16": bf16, "f16": bf16, "f32": tf32, "f32 highest": f32, "f64": f32}
  return Accelerator((kind,), memory, bandwidth, flops, source)


def _tpu(kinds: tuple[str, ...], memory: int, bandwidth: float, bf16: float, version: str) -> Accelerator:
  # Full precision is six products of bfloat16 (jax.lax.Precision.HIGHEST).
  flops = {"bf16": bf16, "f32": bf16, "f32 highest": bf16 / 6}
  return Accelerator(kinds, memory, bandwidth, flops, f"https://cloud.google.com/tpu/docs/{version}")


# GPUs are the SXM modules; FLOP/s are those without sparsity. Memory is what the driver shows, of XLA's descriptions below.
ACCELERATORS = {
  "gpu:a100": _gpu("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, 312e12, 156e12, 19.5e12,
                   "NVIDIA A100 datasheet (2021), https://www.nvidia.com/en-us/data-center/a100"),
  "gpu:h100": _gpu("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.35e12, 989e12, 494e12, 67e12,
                   "NVIDIA H100 datasheet (2023), https://www.nvidia.com/en-us/data-center/h100"),
  "gpu:h200": _gpu("NVIDIA H200", 151_397_597_184, 4.8e12, 989e12, 494e12, 67e12,
                   "NVIDIA H200 datasheet (2024), https://www.nvidia.com/en-us/data-center/h200"),
  "tpu:v5e": _tpu(("TPU v5 lite", "TPU v5e"), 16 * 2**30, 819e9, 197e12, "v5e"),
  "tpu:v5p": _tpu(("TPU v5", "TPU v5p"), 95 * 2**30, 2765e9, 459e12, "v5p"),
  "tpu:v6e": _tpu(("TPU v6 lite", "TPU v6e"), 32 * 2**30, 1600e9, 918e12, "v6e"),
}  # fmt: skip

# What XLA's code generator asks of a GPU: (compute capability, cores, units per core, shared memory of a core, of a block,
# level-2 cache, clock in GHz), from the files of these names in xla/backends/gpu/target_config/specs of openxla/xla.
_XLA_FACTS = {
  "gpu:a100": ("major: 8", 108, 64, 167_936, 166_912, 41_943_040, 1.41),  # a100_sxm_80.txtpb
  "gpu:h100": ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 233_472, 232_448, 52_428_800, 1.98),  # h100_sxm
  "gpu:h200": ("major: 9 feature_extension: ACCELERATED_FEATURES", 132, 128, 233_472, 232_448, 52_428_800, 1.98),  # h200
}  # fmt: skip
# Without the GPU, XLA cannot try which algorithms are fastest; and which of Triton's tilings fit it finds by trying.
_UNTRIED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def devices(target: str) -> list[jax.Device]:
  """The devices of a target, which need not be there.

  Args:
    target: "here"; "gpu:h100" or so, ":8" behind it for eight of a host, ":4x8" for four hosts; "tpu:v5e:2x4", a slice.

  Raises:
    ConfigError: no such target, JAX's plugin for it is not installed, or another process uses it.
  """
  if target == HERE:
    return jax.devices()
  name, shape = re.fullmatch(r"([^:]*(?::[^:]*)?):?(.*)", target).groups()
  if name not in ACCELERATORS or not re.fullmatch(r"|\d+(x\d+)*", shape):
    raise ConfigError(
      f"--target={target}: no such target. Choose {HERE} or one of {', '.join(ACCELERATORS)}, with a number of GPUs"
      " (gpu:h100:8) or the topology of a TPU slice (tpu:v5e:2x4, tpu:v5p:4x4x4)."
    )
  describe = _described_gpus if name.startswith("gpu") else _described_tpus
  return describe(target, name, shape)


def facts(device: jax.Device) -> Accelerator | None:
  """What is known of a device; None of a CPU, and of an accelerator that is not in the table."""
  return next((found for found in ACCELERATORS.values() if device.device_kind in found.kinds), None)


def is_here(mesh: Mesh) -> bool:
  """Whether JAX can run programs on its devices, not only compile for them."""
  return mesh.devices.flat[0] in jax.devices()


def compiler_options(mesh: Mesh) -> dict[str, int]:
  """What XLA needs to be told, beside a step's own options, to compile it for a mesh of GPUs that are not there."""
  return _UNTRIED if mesh.devices.flat[0].platform in ("gpu", "cuda") and not is_here(mesh) else {}


def _described_gpus(target: str, name: str, shape: str) -> list[jax.Device]:
  hosts, _, of_host = (shape or "1").rpartition("x")
  known, (capability, cores, units, of_core, of_block, cache, clock) = ACCELERATORS[name], _XLA_FACTS[name]
  description = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock} l2_cache_size: {cache}
      shared_memory_per_block: 49152 shared_memory_per_core: {of_core} shared_memory_per_block_optin: {of_block}
      memory_bandwidth: {known.bandwidth:.0f} device_memory_size: {known.memory}
      cuda_compute_capability {{ {capability} }} name: "{known.kinds[0]}" device_vendor: "NVIDIA Corporation"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 }} device_description_str: "{known.kinds[0]}"
  """
  try:
    return topologies.get_topology_desc(
      platform="cuda", topology=f"1x{hosts or 1}x{of_host}", target_config=description
    ).devices
  except NotImplementedError as error:  # Of JAX without the plugin.
    raise ConfigError(_missing(target, "its CUDA plugin", f"'jax[cuda12]=={jax.__version__}'")) from error
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"--target={target}: JAX's CUDA plugin cannot describe it ({error}).") from error


def _described_tpus(target: str, name: str, shape: str) -> list[jax.Device]:
  os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
  )  # Else libtpu waits for a cloud's server to tell what machine this is.
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{name.removeprefix('tpu:')}:{shape}").devices
  except RuntimeError as error:
    text = str(error)
  if "not installed" in text:
    wanted = re.search(r"libtpu[^;\n]*", "\n".join(importlib.metadata.requires("jax")))[0].strip()
    raise ConfigError(_missing(target, "libtpu", f"--no-deps '{wanted}'"))
  if "in use" in text or "lockfile" in text:
    text = f"libtpu serves one process at a time, wait for the other or end it ({text})."
  raise ConfigError(f"--target={target}: {text}")


def _missing(target: str, what: str, package: str) -> str:
  return (
    f"--target={target}: JAX {jax.__version__} compiles for it by {what}, which is not installed: pip install {package}"
  )
