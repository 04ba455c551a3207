"""Dense convolutions: every form against XLA's own, in value and both gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.models import convolution, layers

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
  ((5, 6), 3, 4, 7, 1, 1, "same"),  # A map smaller than the kernel.
  ((2, 3), 3, 12, 7, 1, 1, "same"),  # And fewer pixels than filters, here and below.
  ((3, 4), 2, 24, 3, 2, 1, "same"),
  ((2, 2), 3, 8, 3, 1, 2, "same"),
  ((5, 9), 3, 4, 3, 1, 2, "same"),
]


def gradients(function, x, kernel):
  value, pull = jax.vjp(function, x, kernel)
  weight = jnp.asarray(np.random.default_rng(2).normal(size=value.shape), value.dtype)
  return value, *pull(weight)


@pytest.mark.parametrize("size, of, to, kernel_size, stride, rate, padding", CASES)
@pytest.mark.parametrize("large", [0, 2**20])  # By taps, or by rows.
def test_each_form_equals_xlas_in_value_and_gradients(
  size, of, to, kernel_size, stride, rate, padding, large, monkeypatch
):
  monkeypatch.setattr(convolution, "LARGE_KERNEL", large)
  rng = np.random.default_rng(0)
  with jax.enable_x64(True):
    x, kernel = rng.normal(size=(2, *size, of)), rng.normal(size=(kernel_size, kernel_size, of, to))
    padding = layers.paddings(size, kernel_size, stride, rate, padding)
    options = dict(stride=stride, rate=rate, padding=padding)
    found = jax.jit(functools.partial(gradients, lambda x, k: convolution.conv(x, k, **options)))(x, kernel)
    want = jax.jit(functools.partial(gradients, lambda x, k: convolution._xla(x, k, **options)))(x, kernel)
    for ours, theirs in zip(found, want):
      np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_with_fewer_pixels_than_filters_nothing_is_left_to_xlas_convolution():
  """It has no fast code for maps smaller than the kernel."""
  x, kernel = jnp.ones((2, 2, 3, 3)), jnp.ones((7, 7, 3, 12))
  function = functools.partial(gradients, lambda x, k: convolution.conv(x, k, 1, 1, ((3, 3), (3, 3))))
  text = jax.jit(function).lower(x, kernel).compile().as_text()
  assert " convolution(" not in text and " dot(" in text


@pytest.mark.parametrize("large", [0, 2**20])
def test_gradients_in_bfloat16_are_summed_in_float32(large, monkeypatch):
  """4,096 ones sum to 4,096; in bfloat16 they would stall at 256."""
  monkeypatch.setattr(convolution, "LARGE_KERNEL", large)
  x, kernel = jnp.ones((4, 32, 32, 2), jnp.bfloat16), jnp.zeros((3, 3, 2, 2), jnp.bfloat16)
  function = jax.jit(lambda kernel: convolution.conv(x, kernel, 1, 1, ((1, 1), (1, 1))).sum(dtype=jnp.float32))
  gradient = jax.grad(function)(kernel)
  assert gradient.dtype == jnp.bfloat16
  assert gradient[1, 1, 0, 0] == 4096
