"""Layers against XLA's own operations and PyTorch's results, values and gradients."""

import pathlib

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


@pytest.fixture(autouse=True, params=["plain", "cpu", "gpu"])
def on_platform(request):
  with kernels.on(request.param):
    yield


def random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("size, ceil_mode", [((6, 8), False), ((6, 8), True), ((5, 8), True), ((5, 7), True)])
def test_max_pool_equals_reduce_window_in_value_and_gradient(size, ceil_mode):
  x, weight = random(2, *size, 3), random(2, 3, 4, 3, seed=1)

  def ours(x):
    return layers.max_pool_2x2(x, ceil_mode)

  def plain(x):
    outside = ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), outside)

  np.testing.assert_array_equal(ours(x), plain(x))
  got, want = (jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (ours, plain))
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

  got, want = (jax.grad(lambda x, f=f: (f(x) * weight).sum())(x) for f in (resnet.max_pool_3x3, plain))
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(10, 14), (17, 25), (3, 4)])
def test_resizing_equals_torch_by_either_convention(size, align_corners):
  z = np.load(DATA / "torch_resize_pool.npz")
  got = resize.resize_bilinear(jnp.asarray(z["x"].transpose(0, 2, 3, 1)), size, align_corners)
  want = z[f"bilinear_{size[0]}x{size[1]}_corners{int(align_corners)}"]
  np.testing.assert_allclose(got.transpose(0, 3, 1, 2), want, atol=2e-6)


def test_transposed_convolution_equals_lax_in_value_and_gradients():
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
  np.testing.assert_allclose(ours(*arguments), plain(*arguments), atol=1e-5)
  got, want = (jax.grad(lambda *a, f=f: (f(*a) * weight).sum(), (0, 1, 2))(*arguments) for f in (ours, plain))
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, atol=1e-5)


@pytest.mark.parametrize("stride, size", [(2, (3, 4)), (8, (2, 3)), (1, (1, 2))])
def test_overlapping_transposed_convolution_equals_lax_in_value_and_gradients_in_float64(stride, size):
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
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-13)
    got, want = (jax.grad(lambda x, k, f=f: (f(x, k) * weight).sum(), (0, 1))(x, kernel) for f in (ours, plain))
    for g, w in zip(got, want):
      assert g.dtype == jnp.float64
      np.testing.assert_allclose(g, w, atol=1e-13)


@pytest.mark.parametrize("name, stride", [("tconv4_s2", 2), ("tconv16_s8", 8)])
def test_overlapping_transposed_convolution_equals_torch(shared, name, stride):
  z = np.load(shared / "reference/torch/fixtures/ops.npz")
  kernel = z[f"w_t{2 * stride}"].transpose(2, 3, 0, 1)
  layer = layers.ConvTranspose(*kernel.shape[2:], stride, kernel_init=layers.he_normal, rngs=nnx.Rngs(0))
  layer.kernel[...] = kernel
  np.testing.assert_allclose(layer(z["x"].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2), z[name], atol=2e-6)


@pytest.mark.parametrize("stride", [2, 8, 32])
def test_bilinear_kernel_interpolates_between_pixel_centres_and_fixed_equals_learnable(stride):
  layer, x = layers.ConvTranspose(2, 2, stride, rngs=nnx.Rngs(0)), random(1, 5, 4, 2)
  fixed, half = resize.upsample_bilinear(x, stride), stride // 2
  np.testing.assert_allclose(fixed, layer(x), atol=1e-6)
  want = jax.image.resize(x, (1, 5 * stride, 4 * stride, 2), "linear")
  inner = np.s_[:, half:-half, half:-half]  # At the edge jax repeats the last pixel; here zeros begin.
  np.testing.assert_allclose(fixed[:, half:-half, half:-half][inner], want[inner], atol=1e-6)


@pytest.mark.parametrize("momentum, epsilon", [(0.1, 1e-5), (0.01, 1e-5), (0.1, 1e-3), (0.0003, 1e-3)])
def test_batch_norm_equals_torch(momentum, epsilon):
  z, key = np.load(DATA / "torch_optim_bn.npz"), f"bn_m{momentum}_eps{'1e-05' if epsilon == 1e-5 else '0.001'}_"
  initial = torch_weights(dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (5,)), gain=1.0)
  norm = layers.BatchNorm(5, momentum=1 - momentum, epsilon=epsilon)
  norm.scale[...], norm.bias[...] = initial["weight"], initial["bias"]
  norm.mean[...], norm.var[...] = initial["running_mean"], initial["running_var"]
  x = jnp.asarray(z["bn_x"].transpose(0, 2, 3, 1))
  np.testing.assert_allclose(norm(x, True).transpose(0, 3, 1, 2), z[key + "y"], atol=2e-6)
  np.testing.assert_allclose(norm.mean[...], z[key + "running_mean"], atol=1e-6)
  np.testing.assert_allclose(norm.var[...], z[key + "running_var"], atol=1e-6)  # The unbiased variance.
  before = norm.var[...]
  np.testing.assert_allclose(norm(x, False).transpose(0, 3, 1, 2), z[key + "y_eval"], atol=2e-6)
  np.testing.assert_array_equal(norm.var[...], before)


@pytest.mark.parametrize("activation", [layers.linear, jax.nn.relu, jax.nn.relu6])
@pytest.mark.parametrize("size", [(4, 5), (4, 4), (1, 3)])
def test_batch_norm_has_the_gradients_of_its_formula(size, activation):
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

    def value_and_gradients(function):
      def both(weight, *arguments):
        y, pull = jax.vjp(function, *arguments)
        return y, *pull(weight)

      return jax.jit(both)(weight, x, scale, bias)

    for a, b in zip(value_and_gradients(ours), value_and_gradients(formula)):
      np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_batch_norm_keeps_its_digits_where_the_mean_is_large():
  norm = layers.BatchNorm(1)
  x = 1000 + 0.1 * random(8, 16, 16, 1)
  assert np.std(norm(x, True)) == pytest.approx(1, abs=0.02)  # E[x^2] - E[x]^2 would give a variance of 0.


@pytest.mark.parametrize("row", [0, 8, 15])
def test_batch_norm_keeps_its_digits_where_a_row_is_far_from_the_others(row):
  norm, x = layers.BatchNorm(1, momentum=0), random(4, 16, 16, 1).at[:, row].add(1000)
  norm(x, True)
  exact = np.asarray(x, np.float64)
  np.testing.assert_allclose(norm.mean[...], exact.mean(), rtol=1e-6)
  np.testing.assert_allclose(norm.var[...], exact.var(ddof=1), rtol=1e-5)


def test_batch_norm_statistics_stay_float32_under_bfloat16():
  norm = layers.BatchNorm(2, dtype=jnp.bfloat16)
  out = norm(random(4, 8, 8, 2).astype(jnp.bfloat16), True)
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
