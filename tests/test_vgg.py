"""VGG-16: sizes and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from segjax.models.backbones import vgg


def test_poolings_round_up_and_their_padding_is_seen_by_nobody():
  @jax.jit  # Op by op takes ten times as long.
  def forward(image):
    endpoints = {}
    vgg.VGG16(width=2, rngs=nnx.Rngs(0))(image, endpoints=endpoints)
    return endpoints

  endpoints = forward(jnp.ones((1, 33, 47, 3)))
  assert [endpoints[f"pool{n}"].shape[1:3] for n in range(1, 6)] == [(17, 24), (9, 12), (5, 6), (3, 3), (2, 2)]
  assert all(jnp.isfinite(x).all() for x in endpoints.values())


def test_dropout_acts_on_fc6_and_fc7_in_training_only():
  @jax.jit
  def forwards(x):
    model = vgg.VGG16(width=2, rngs=nnx.Rngs(0))
    still = model(x), model(x, train=False, key=jax.random.key(0)), model(x, train=True)
    return still, [model(x, train=True, key=jax.random.key(seed)) for seed in (0, 0, 1)]

  (still, evaluated, without_key), draws = forwards(jnp.ones((2, 32, 32, 3)))
  np.testing.assert_array_equal(evaluated, still)
  np.testing.assert_array_equal(without_key, still)
  np.testing.assert_array_equal(draws[0], draws[1])
  assert jnp.abs(draws[0] - draws[2]).max() > 1e-3 and jnp.abs(draws[0] - still).max() > 1e-3
