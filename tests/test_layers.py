"""Layers against XLA's own operations and PyTorch's results, values and gradients."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from segjax import kernels
from segjax.models import layers, resize
from segjax.models.backbones import resnet
from tests.seeded import torch_weights

DATA = pathlib.Path(__file__).parent / "data"


# Of what has a form of its own there. All else is traced as it is elsewhere, as the first test says.
PLATFORMS = pytest.mark.parametrize("platform", ["plain", "cpu", "gpu"])


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def values_and_gradients(platform, functions, weight, *arguments):
  """Of each function, its value and the gradients of the sum of `weight` times that. Op by op takes ten times as long."""

  @jax.jit
  @kernels.on(platform)
  def of_all(weight, *arguments):
    values, pulls = zip(*(jax.vjp(function, *arguments) for function in functions))
    return tuple((value, *pull(weight)) for value, pull in zip(values, pulls))

  return of_all(weight, *arguments)


@functools.partial(nnx.jit, static_argnums=2)
def trained(norm, x, platform):
  """A batch norm's result in training; it keeps the statistics."""
  with kernels.on(platform):
    return norm(x, True)


def test_what_has_no_form_of_a_platform_is_traced_as_the_plain_one():
  image, norm = jax.ShapeDtypeStruct((2, 6, 8, 3), jnp.float32), layers.BatchNorm(3)
  transposed = layers.ConvTranspose2x2(3, 5, rngs=nnx.Rngs(0)), layers.ConvTranspose(3, 3, 8, rngs=nnx.Rngs(0))
  own_on_gpu = layers.max_pool_2x2, lambda x: resize.resize_bilinear(x, (9, 5))
  plain_everywhere = {
    "max_pool_3x3": resnet.max_pool_3x3,
    "upsample_bilinear": lambda x: resize.upsample_bilinear(x, 8),
    "dropout": lambda x: layers.dropout(x, 0.5, jax.random.key(0)),
    "batch_norm in evaluation": lambda x: norm(x, False),
  }

  def traced(function, platform):
    with kernels.on(platform):
      return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(jax.value_and_grad(lambda x: function(x).sum()))(image)))

  for name, function in plain_everywhere.items():
    assert traced(function, "plain") == traced(function, "cpu") == traced(function, "gpu"), name
  for layer in transposed:
    assert traced(layer, "plain") == traced(layer, "gpu") != traced(layer, "cpu")
  for function in own_on_gpu:
    assert traced(function, "plain") == traced(function, "cpu") != traced(function, "gpu")


@pytest.mark.parametrize("platform", ["plain", "gpu"])
@pytest.mark.parametrize("size, ceil_mode", [((6, 8), False), ((6, 8), True), ((5, 8), True), ((5, 7), True)])
def test_max_pool_equals_reduce_window_in_value_and_gradient(size, ceil_mode, platform):
  x, weight = random(2, *size, 3), random(2, 3, 4, 3, seed=1)

  def ours(x):
    return layers.max_pool_2x2(x, ceil_mode)

  def plain(x):
    outside = ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), outside)

  for got, want in zip(*values_and_gradients(platform, (ours, plain), weight, x)):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_max_pool_shares_gradients_alike_on_every_platform_where_values_tie(dtype):
  windows = np.stack(np.meshgrid(*[[0, 1]] * 4), -1).reshape(1, 1, 16, 2, 2)  # All 16 of two values.
  x = jnp.asarray(windows.transpose(0, 1, 3, 2, 4).reshape(1, 2, 32, 1), dtype)
  weight = random(1, 1, 16, 1).astype(dtype)
  plain, gpu = (values_and_gradients(platform, (layers.max_pool_2x2,), weight, x)[0] for platform in ("plain", "gpu"))
  for got, want in zip(gpu, plain):
    np.testing.assert_array_equal(got, want)


def test_max_pool_refuses_odd_sizes():
  with pytest.raises(ValueError, match="even height and width, got 5x4"):
    layers.max_pool_2x2(random(1, 5, 4, 1))


@pytest.mark.parametrize("name", ["x", "x8"])
def test_3x3_max_pool_equals_torch_in_value_and_lax_in_gradient(name):
  z = np.load(DATA / "torch_resize_pool.npz")
  x = jnp.asarray(z[name].transpose(0, 2, 3, 1))  # 5x7 and 6x8.
  want = z["maxpool3_s2_p1" if name == "x" else "x8_maxpool3_s2_p1"]
  np.testing.assert_array_equal(resnet.max_pool_3x3(x).transpose(0, 3, 1, 2), want)
  weight = random(*resnet.max_pool_3x3(x).shape, seed=1)

  def plain(x):
    outside = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), outside)

  (_, got), (_, want) = values_and_gradients("plain", (resnet.max_pool_3x3, plain), weight, x)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(10, 14), (17, 25), (3, 4)])
def test_resizing_equals_torch_by_either_convention(size, align_corners):
  z = np.load(DATA / "torch_resize_pool.npz")
  got = resize.resize_bilinear(jnp.asarray(z["x"].transpose(0, 2, 3, 1)), size, align_corners)
  want = z[f"bilinear_{size[0]}x{size[1]}_corners{int(align_corners)}"]
  np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, atol=2e-6)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(13, 14), (4, 40), (7, 3), (1, 21)])
def test_resizing_on_gpu_equals_the_plain_one_in_value_and_gradient(size, align_corners):
  x, weight = random(2, 7, 5, 3), random(2, *size, 3, seed=1)
  resized = (lambda x: resize.resize_bilinear(x, size, align_corners),)
  plain, gpu = (values_and_gradients(platform, resized, weight, x)[0] for platform in ("plain", "gpu"))
  for got, want in zip(gpu, plain):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_resizing_on_gpu_rounds_to_bfloat16_once_along_each_axis():
  x = jnp.asarray([[[[1.0], [1.0078125]]]], jnp.bfloat16)  # One number of bfloat16 apart.
  with kernels.on("gpu"):
    got = resize.resize_bilinear(x, (1, 5))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got.reshape(-1), jnp.linspace(1, 1.0078125, 5).astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", ["plain", "cpu"])
def test_transposed_convolution_equals_lax_in_value_and_gradients(platform):
  layer = layers.ConvTranspose2x2(3, 5, rngs=nnx.Rngs(0))
  graphdef = nnx.graphdef(layer)
  x, weight = random(2, 3, 4, 3), random(2, 6, 8, 5, seed=1)

  def ours(x, kernel, bias):
    return nnx.merge(graphdef, {"kernel": kernel, "bias": bias}, copy=True)(x)

  def plain(x, kernel, bias):
    # lax slides the kernel flipped: output (2i+a, 2j+b) takes kernel[1-a, 1-b].
    y = jax.lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + bias.reshape(1, 1, 1, -1)

  arguments = x, layer.kernel[...], random(5, seed=2)
  for g, w in zip(*values_and_gradients(platform, (ours, plain), weight, *arguments)):
    np.testing.assert_allclose(g, w, atol=1e-5)


@pytest.mark.parametrize("platform", ["plain", "cpu"])
@pytest.mark.parametrize("stride, size", [(2, (3, 4)), (8, (2, 3)), (1, (1, 2))])
def test_overlapping_transposed_convolution_equals_lax_in_value_and_gradients_in_float64(stride, size, platform):
  with jax.enable_x64(True):
    layer = layers.ConvTranspose(3, 5, stride, kernel_init=layers.he_normal, dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)))
    weight = np.random.default_rng(1).normal(size=(2, (size[0] + 1) * stride, (size[1] + 1) * stride, 5))

    def ours(x, kernel):
      return nnx.merge(nnx.graphdef(layer), {"kernel": kernel}, copy=True)(x)

    def plain(x, kernel):
      order = ("NHWC", "HWIO", "NHWC")
      return jax.lax.conv_transpose(x, kernel[::-1, ::-1], (stride, stride), "VALID", dimension_numbers=order)

    kernel = layer.kernel[...]
    for g, w in zip(*values_and_gradients(platform, (ours, plain), weight, x, kernel)):
      assert g.dtype == jnp.float64
      np.testing.assert_allclose(g, w, atol=1e-13)


@pytest.mark.parametrize("platform", ["plain", "cpu"])
@pytest.mark.parametrize("name, stride", [("tconv4_s2", 2), ("tconv16_s8", 8)])
def test_overlapping_transposed_convolution_equals_torch(shared, name, stride, platform):
  z = np.load(shared / "reference/torch/fixtures/ops.npz")
  kernel = z[f"w_t{2 * stride}"].transpose(2, 3, 0, 1)
  layer = layers.ConvTranspose(*kernel.shape[2:], stride, kernel_init=layers.he_normal, rngs=nnx.Rngs(0))
  layer.kernel[...] = kernel
  with kernels.on(platform):
    got = layer(z["x"].transpose(0, 2, 3, 1))
  np.testing.assert_allclose(got.transpose(0, 3, 1, 2), z[name], atol=2e-6)


@pytest.mark.parametrize("platform", ["plain", "cpu"])
@pytest.mark.parametrize("stride", [2, 8, 32])
def test_bilinear_kernel_interpolates_between_pixel_centres_and_fixed_equals_learnable(stride, platform):
  layer, x = layers.ConvTranspose(2, 2, stride, rngs=nnx.Rngs(0)), random(1, 5, 4, 2)
  fixed, half = resize.upsample_bilinear(x, stride), stride // 2
  with kernels.on(platform):
    np.testing.assert_allclose(fixed, layer(x), atol=1e-6)
  want = jax.image.resize(x, (1, 5 * stride, 4 * stride, 2), "linear")
  inner = np.s_[:, half:-half, half:-half]  # At the edge jax repeats the last pixel; here zeros begin.
  np.testing.assert_allclose(fixed[:, half:-half, half:-half][inner], want[inner], atol=1e-6)


@PLATFORMS
@pytest.mark.parametrize("momentum, epsilon", [(0.1, 1e-5), (0.01, 1e-5), (0.1, 1e-3), (0.0003, 1e-3)])
def test_batch_norm_equals_torch(momentum, epsilon, platform):
  z, key = np.load(DATA / "torch_optim_bn.npz"), f"bn_m{momentum}_eps{'1e-05' if epsilon == 1e-5 else '0.001'}_"
  initial = torch_weights(dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (5,)), gain=1.0)
  norm = layers.BatchNorm(5, momentum=1 - momentum, epsilon=epsilon)
  norm.scale[...], norm.bias[...] = initial["weight"], initial["bias"]
  norm.mean[...], norm.var[...] = initial["running_mean"], initial["running_var"]
  x = jnp.asarray(z["bn_x"].transpose(0, 2, 3, 1))
  np.testing.assert_allclose(trained(norm, x, platform).transpose(0, 3, 1, 2), z[key + "y"], atol=2e-6)
  np.testing.assert_allclose(norm.mean[...], z[key + "running_mean"], atol=1e-6)
  np.testing.assert_allclose(norm.var[...], z[key + "running_var"], atol=1e-6)  # The unbiased variance.
  before = norm.var[...]
  np.testing.assert_allclose(norm(x, False).transpose(0, 3, 1, 2), z[key + "y_eval"], atol=2e-6)
  np.testing.assert_array_equal(norm.var[...], before)


@PLATFORMS
@pytest.mark.parametrize("activation", [layers.linear, jax.nn.relu, jax.nn.relu6])
@pytest.mark.parametrize("size", [(4, 5), (4, 4), (1, 3)])
def test_batch_norm_has_the_gradients_of_its_formula(size, activation, platform):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, weight = (jnp.asarray(rng.normal(size=(3, *size, 2)) + 2) for _ in range(2))
    scale, bias = jnp.asarray([0.5, -4.0]), jnp.asarray([0.1, 3.0])  # Some results lie below 0, some above 6.
    graphdef, _, statistics = nnx.split(layers.BatchNorm(2, dtype=jnp.float64), nnx.Param, ...)

    def ours(x, scale, bias):
      return nnx.merge(graphdef, {"scale": scale, "bias": bias}, statistics, copy=True)(x, True, activation)

    def formula(x, scale, bias):
      deviation = jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5)
      normal = (x - x.mean((0, 1, 2), keepdims=True)) / deviation
      return activation(normal * scale.reshape(1, 1, 1, 2) + bias.reshape(1, 1, 1, 2))

    for a, b in zip(*values_and_gradients(platform, (ours, formula), weight, x, scale, bias)):
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@PLATFORMS
def test_batch_norm_keeps_its_digits_where_the_mean_is_large(platform):
  norm = layers.BatchNorm(1)
  x = 1000 + 0.1 * random(8, 16, 16, 1)
  assert np.std(trained(norm, x, platform)) == pytest.approx(1, abs=0.02)  # E[x^2] - E[x]^2 would give a variance of 0.


@PLATFORMS
@pytest.mark.parametrize("row", [0, 8, 15])
def test_batch_norm_keeps_its_digits_where_a_row_is_far_from_the_others(row, platform):
  norm, x = layers.BatchNorm(1, momentum=0), random(4, 16, 16, 1).at[:, row].add(1000)
  trained(norm, x, platform)
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(norm.mean[...], exact.mean(), rtol=1e-6)
  np.testing.assert_allclose(norm.var[...], exact.var(ddof=1), rtol=1e-5)


@PLATFORMS
def test_batch_norm_statistics_stay_float32_under_bfloat16(platform):
  norm = layers.BatchNorm(2, dtype=jnp.bfloat16)
  out = trained(norm, random(4, 8, 8, 2).astype(jnp.bfloat16), platform)
  assert out.dtype == jnp.bfloat16 and norm.mean[...].dtype == norm.scale[...].dtype == jnp.float32


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
  x = jnp.ones((4, 50, 50, 2))
  out = layers.dropout(x, 0.3, jax.random.key(0))
  assert float(out.mean()) == pytest.approx(1, abs=0.02)
  assert float((out == 0).mean()) == pytest.approx(0.3, abs=0.02)
  assert layers.dropout(x, 0.3, None) is x


def test_resize_with_aligned_corners_by_hand():
  x = jnp.array([0.0, 3.0]).reshape(1, 1, 2, 1)
  np.testing.assert_allclose(resize.resize_bilinear(x, (1, 4)).reshape(-1), [0, 1, 2, 3], atol=1e-6)
  x = jnp.arange(5.0).reshape(1, 5, 1, 1)
  np.testing.assert_allclose(resize.resize_bilinear(x, (3, 1)).reshape(-1), [0, 2, 4])


def test_resize_to_the_same_size_is_the_identity_and_reproduces_linear_ramps():
  x = random(2, 5, 7, 3)
  assert resize.resize_bilinear(x, (5, 7)) is x
  ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 9).reshape(1, 9, 1, 1), (1, 9, 4, 1))
  np.testing.assert_allclose(resize.resize_bilinear(ramp, (23, 4))[0, :, 0, 0], np.linspace(-1, 1, 23), atol=1e-6)
