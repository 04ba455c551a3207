"""The depthwise convolution against XLA's grouped one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from segjax import kernels, sharding
from segjax.kernels import depthwise
from segjax.models import layers
from tests.marks import full

PLATFORMS = ("plain", "cpu", "gpu")  # Each has a form.


def grouped(x, kernel, stride, rate, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding,
    rhs_dilation=(rate, rate),
    feature_group_count=x.shape[-1],
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


@pytest.mark.parametrize(
  "stride, rate, padding",
  [*((1, rate, "same") for rate in (1, 2, 4, 6, 18)), (2, 1, "same"), (2, 1, "fixed"), (2, 2, "same"), (2, 2, "fixed")],
)
@pytest.mark.parametrize("size", [(9, 12), *full(((5, 40),))])
def test_depthwise_equals_grouped_convolution(stride, rate, size, padding):
  with jax.enable_x64(True):
    key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key[0], (2, *size, 5), jnp.float64)
    kernel = jax.random.normal(key[1], (3, 3, 1, 5), jnp.float64)
    around = layers.paddings(size, 3, stride, rate, padding)
    g = jax.random.normal(key[2], (2, -(-size[0] // stride), -(-size[1] // stride), 5), jnp.float64)

    def value_and_gradients(function, x, kernel, g):
      value, pull = jax.vjp(lambda x, k: function(x, k, stride, rate, around), x, kernel)
      return value, *pull(g)

    @jax.jit  # Op by op takes ten times as long.
    def all_forms(x, kernel, g):
      found = {}
      for platform in PLATFORMS:
        with kernels.on(platform):
          found[platform] = value_and_gradients(depthwise.depthwise_conv, x, kernel, g)
      return found, value_and_gradients(grouped, x, kernel, g)

    found, want = all_forms(x, kernel, g)
    for platform in PLATFORMS:
      for ours, theirs in zip(found[platform], want):
        np.testing.assert_allclose(ours, theirs, atol=1e-12, err_msg=platform)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("data, space", [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("spec", [("data",), ("data", "space")])
def test_kernel_gradient_is_right_on_every_mesh(data, space, spec, platform):
  mesh = sharding.make_mesh(data, space)
  with jax.enable_x64(True):
    x = jax.random.normal(jax.random.key(0), (8, 16, 6, 3), jnp.float64)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 3), jnp.float64)

    def loss(x, kernel):
      return (depthwise.depthwise_conv(x, kernel, 1, 2, ((2, 2), (2, 2))) ** 2).sum()

    gradient = jax.jit(kernels.on(platform)(jax.grad(loss, argnums=(0, 1))))
    want = gradient(x, kernel)
    got = gradient(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))), kernel)
    for ours, theirs in zip(got, want):
      np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("stride, rate, size", [(1, 1, (9, 6)), (2, 1, (8, 6)), *full((1, 4, (9, 6)))])
def test_gradients_for_accelerators_are_those_of_one_device(platform, stride, rate, size):
  """Each device takes the kernel gradient of its own images, which are then added."""
  mesh, around = sharding.make_mesh(8, 1), layers.paddings(size, 3, stride, rate, "same")

  def loss(x, kernel):
    return (depthwise.depthwise_conv(x, kernel, stride, rate, around) ** 2).sum()

  with jax.enable_x64(True):
    x = jax.random.normal(jax.random.key(0), (8, *size, 3), jnp.float64)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 3), jnp.float64)
    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    of_mesh = sharding.on(mesh)(kernels.on(platform)(jax.grad(loss, argnums=(0, 1))))
    got = jax.jit(of_mesh)(jax.device_put(x, sharding.batch_sharding(mesh)), sharding.gather(kernel, mesh))
    for ours, theirs in zip(got, want):
      np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_sums_in_float32(platform):
  x = jnp.full((1, 8, 8, 1), 1.0, jnp.bfloat16)
  kernel = jnp.full((3, 3, 1, 1), 1 / 256).at[1, 1].set(1.0)  # In bfloat16, 1 + 1/256 is 1 again.

  @jax.jit
  @kernels.on(platform)
  def value_and_gradients(x, kernel):
    y, pull = jax.vjp(lambda x, k: depthwise.depthwise_conv(x, k, 1, 1, ((1, 1), (1, 1))), x, kernel)
    return y, pull(y)

  y, gradients = value_and_gradients(x, kernel)
  assert y.dtype == jnp.bfloat16 and float(y[0, 4, 4, 0]) == pytest.approx(1 + 8 / 256, abs=1e-6)
  assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("n, first, same", [(65, 1, 1), (64, 1, 0), (5, 1, 1), (4, 1, 0)])
def test_fixed_and_same_padding_differ_for_even_sizes_only(n, first, same):
  assert layers.paddings((n, n), 3, 2, 1, "fixed")[0] == (1, 1)
  assert layers.paddings((n, n), 3, 2, 1, "same")[0] == (same, 1)
  assert layers.paddings((n, n), 3, 1, 4, "same") == layers.paddings((n, n), 3, 1, 4, "fixed")
