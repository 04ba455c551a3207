"""Dense convolutions: every form against XLA's own, in value and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax import kernels
from segjax.kernels import convolution
from segjax.models import layers

CASES = [
  # (H, W), in, out, kernel, stride, rate, padding
  ((9, 12), 3, 5, 3, 1, 1, "same"),
  ((9, 12), 3, 5, 3, 2, 1, "same"),
  ((10, 11), 2, 3, 3, 2, 1, "fixed"),
  ((10, 9), 2, 3, 3, 1, 2, "valid"),
  ((7, 8), 4, 2, 3, 1, 6, "same"),  # Rate near the size: most taps see padding.
  ((12, 9), 3, 2, 7, 2, 1, "same"),
  ((8, 7), 4, 6, 1, 1, 1, "same"),
  ((9, 8), 4, 6, 1, 2, 1, "same"),
  ((9, 12), 5, 3, 1, 1, 1, "same"),
  ((5, 6), 3, 4, 7, 1, 1, "same"),  # A map smaller than the kernel.
  ((2, 3), 3, 12, 7, 1, 1, "same"),  # And fewer pixels than filters, here and below.
  ((3, 4), 2, 24, 3, 2, 1, "same"),
  ((2, 2), 3, 8, 3, 1, 2, "same"),
  ((5, 9), 3, 4, 3, 1, 2, "same"),
  ((9, 7), 6, 2, 5, 1, 2, "same"),  # More features in than out, here and below.
  ((9, 12), 5, 3, 3, 1, 1, "fixed"),
  ((9, 8), 5, 3, 3, 1, 1, "valid"),
]


@pytest.fixture(autouse=True)
def on_cpu():
  with kernels.on("cpu"):
    yield


def gradients(function, x, kernel):
  value, pull = jax.vjp(function, x, kernel)
  weight = jnp.asarray(np.random.default_rng(2).normal(size=value.shape), value.dtype)
  return value, *pull(weight)


def ours_and_plain(x, kernel, **options):
  """Value and gradients of the form that is taken, and of XLA's own. Compiled as one, which is sooner."""

  @jax.jit
  def both(x, kernel):
    return tuple(
      gradients(lambda x, k, f=f: f(x, k, **options), x, kernel) for f in (convolution.conv, convolution.plain)
    )

  return both(x, kernel)


@pytest.mark.parametrize(
  "platform, size, of, to, kernel_size, stride, rate, padding",
  [*(("cpu", *case) for case in CASES), *(("gpu", *case) for case in CASES if case[3] == 1)],  # GPU has one for 1x1.
)
def test_each_form_equals_xlas_in_value_and_gradients(platform, size, of, to, kernel_size, stride, rate, padding):
  rng = np.random.default_rng(0)
  with jax.enable_x64(True), kernels.on(platform):
    x, kernel = rng.normal(size=(2, *size, of)), rng.normal(size=(kernel_size, kernel_size, of, to))
    padding = layers.paddings(size, kernel_size, stride, rate, padding)
    options = dict(stride=stride, rate=rate, padding=padding)
    for ours, theirs in zip(*ours_and_plain(x, kernel, **options)):
      np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


WINOGRAD = [  # (H, W), padding: rows that fill their tiles of four and rows that do not.
  ((8, 9), ((1, 1), (1, 1))),
  ((9, 12), ((1, 1), (1, 1))),
  ((3, 4), ((1, 1), (1, 1))),
  ((7, 5), ((0, 0), (0, 0))),
  ((10, 6), ((0, 2), (2, 1))),
]


@pytest.mark.parametrize("batch, features", [(2, (3, 4)), (1, (40, 50))])
@pytest.mark.parametrize("size, padding", WINOGRAD)
def test_winograds_sums_equal_xlas_convolution_in_value_and_gradients(size, padding, batch, features, monkeypatch):
  monkeypatch.setattr(convolution, "_fast_forms", lambda *_: convolution.WINOGRAD)
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, kernel = rng.normal(size=(batch, *size, features[0])), rng.normal(size=(3, 3, *features))
    options = dict(stride=1, rate=1, padding=padding)
    for ours, theirs in zip(*ours_and_plain(x, kernel, **options)):
      np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size, features", [((4, 32, 32), 128), ((2, 16, 16), 512)])  # Few features, and few pixels.
def test_winograds_sums_lose_two_millionths_in_float32_at_most(size, features):
  """By root mean squares; the plain form loses 0.4 millionths."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(*size, features)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, features, features)).astype(np.float32)
  options = dict(stride=1, rate=1, padding=((1, 1), (1, 1)))
  assert convolution._fast_forms(x, kernel, **options) == convolution.WINOGRAD
  found = jax.jit(functools.partial(gradients, lambda x, k: convolution.conv(x, k, **options)))(x, kernel)
  with jax.enable_x64(True):
    exact = functools.partial(gradients, lambda x, k: convolution.plain(x, k, **options))
    want = jax.jit(exact)(x.astype(np.float64), kernel.astype(np.float64))
  errors = [np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b) for a, b in zip(found, map(np.asarray, want))]
  print("relative errors of the value and the gradients by x and by the kernel", errors)
  assert max(errors) < 2e-6


def test_winograds_sums_are_taken_where_they_pay():
  def forms(shape, to, kernel_size=3, dtype=jnp.float32, **others):
    options = dict(stride=1, rate=1, padding=((1, 1), (1, 1))) | others
    x, kernel = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((kernel_size,) * 2 + (shape[-1], to), dtype)
    return convolution._fast_forms(x, kernel, **options)

  assert forms((4, 64, 64, 256), 256) == convolution.WINOGRAD
  assert forms((16, 32, 32, 64), 64) == convolution.WINOGRAD
  assert forms((4, 256, 256, 32), 64) == convolution.XLA
  assert forms((4, 64, 64, 256), 256, stride=2) == convolution.XLA
  assert forms((4, 64, 64, 256), 256, rate=2) == convolution.XLA
  assert forms((4, 64, 64, 256), 256, kernel_size=5) == convolution.XLA
  assert forms((4, 64, 64, 256), 256, padding=((100, 100), (100, 100))) == convolution.XLA  # FCN's first layer.
  assert forms((4, 64, 64, 256), 256, dtype=jnp.bfloat16) == convolution.XLA  # Of whose eight bits they would lose two.
  assert forms((2, 4, 4, 512), 512) == convolution.PATCHES


def test_with_fewer_pixels_than_filters_nothing_is_left_to_xlas_convolution():
  """It has no fast code for maps smaller than the kernel."""
  x, kernel = jnp.ones((2, 2, 3, 3)), jnp.ones((7, 7, 3, 12))
  function = functools.partial(gradients, lambda x, k: convolution.conv(x, k, 1, 1, ((3, 3), (3, 3))))
  text = jax.jit(function).lower(x, kernel).compile().as_text()
  assert " convolution(" not in text and " dot(" in text


def test_gradients_in_bfloat16_are_summed_in_float32():
  """4,096 ones sum to 4,096; in bfloat16 they would stall at 256."""
  x, kernel = jnp.ones((4, 32, 32, 2), jnp.bfloat16), jnp.zeros((3, 3, 2, 2), jnp.bfloat16)
  function = jax.jit(lambda kernel: convolution.conv(x, kernel, 1, 1, ((1, 1), (1, 1))).sum(dtype=jnp.float32))
  gradient = jax.grad(function)(kernel)
  assert gradient.dtype == jnp.bfloat16
  assert gradient[1, 1, 0, 0] == 4096
