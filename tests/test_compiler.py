"""What XLA is told when it compiles a step, and what it makes of it."""

import re

import jax
import jax.numpy as jnp
import pytest

from segjax import kernels
from segjax.kernels import compiler, convolution
from segjax.models import layers


@pytest.fixture(autouse=True)
def asked_anew():
  compiler.options.cache_clear()
  with kernels.on("cpu"):
    yield
  compiler.options.cache_clear()


@pytest.mark.parametrize("kind, products", [("train", True), ("eval", False)])
def test_on_cpu_convolutions_are_not_left_to_ynnpack_and_products_in_training_alone(kind, products):
  def by_ynnpack(function, *arguments):
    compiled = jax.jit(function, compiler_options=compiler.options(kind, "cpu")).lower(*arguments).compile()
    return "ynn_fusion" in compiled.as_text()

  def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  assert not by_ynnpack(convolve, jnp.ones((4, 64, 64, 32)), jnp.ones((3, 3, 32, 32)))
  assert by_ynnpack(jnp.matmul, jnp.ones((512, 512)), jnp.ones((512, 512))) == products


def test_on_cpu_maps_are_computed_before_a_gradient_by_the_kernel_transposes_them():
  """Jax 0.10.2 needs to be told; 0.12 keeps these apart of itself."""

  def loss(kernel, x, scale):
    return jnp.square(convolution.conv(x * scale, kernel, 1, 1, ((1, 1), (1, 1)))).sum()

  gradient = jax.jit(jax.grad(loss), compiler_options=compiler.options("train", "cpu"))
  text = gradient.lower(jnp.ones((3, 3, 4, 8)), jnp.ones((2, 16, 16, 4)), jnp.ones(())).compile().as_text()
  transposing = [loop for loop in re.split(r"\n(?=%)", text) if " transpose(" in loop and "ENTRY" not in loop]
  assert transposing and not any(" multiply(" in loop for loop in transposing)


def test_on_cpu_the_gradient_of_batch_norm_and_relu_writes_no_map_but_its_result():
  def loss(x, weight):
    return (layers.BatchNorm(8)(x, True, jax.nn.relu) * weight).sum()

  x = jnp.ones((2, 16, 16, 8))
  gradient = jax.jit(jax.grad(loss), compiler_options=compiler.options("train", "cpu"))
  entry = gradient.lower(x, x).compile().as_text().split("\nENTRY ")[1]
  maps = re.findall(r"= f32\[2,(?:16,16|256),8\]\S* (?!parameter|get-tuple-element|bitcast)(\S+?)\(", entry)
  assert maps == ["fusion"], maps


def test_an_xla_that_does_not_know_the_option_gets_none(monkeypatch):
  monkeypatch.setattr(compiler, "_BY_YNNPACK", {"train": "NO_SUCH_LIBRARY"})
  assert compiler.options("train", "cpu") == {}


@pytest.mark.parametrize("platform", ["tpu", "split_tpu", "plain"])
def test_other_platforms_get_none(platform):
  assert compiler.options("train", platform) == {}


@pytest.mark.parametrize("platform", ["gpu", "split_gpu"])
def test_a_gpu_is_told_which_all_reduces_become_one_and_to_round_by_options_that_this_xla_knows(platform):
  options = compiler.options("train", platform)
  assert options.keys() == {"xla_gpu_all_reduce_combine_threshold_bytes", "xla_allow_excess_precision"}
  jax.jit(lambda: 0, compiler_options=options).lower().compile()
  with pytest.raises(jax.errors.JaxRuntimeError):
    jax.jit(lambda: 0, compiler_options=dict.fromkeys((name + "_unknown" for name in options), "1")).lower().compile()
