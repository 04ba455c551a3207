"""Laws of DeepLabV3+ that need no reference, and its refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from segjax import models
from segjax.models.backbones import strides


def lively_state(model, seed=0):
  """Values under which signals neither die nor explode, as of a trained network; XLA takes 20 s to draw them."""
  draw = np.random.default_rng(seed)

  def value(path, leaf):
    name = [str(key.key) for key in path if hasattr(key, "key")][-1]
    if name in ("scale", "var"):
      array = draw.uniform(0.8, 1.2, leaf.shape)
    elif name.endswith("kernel"):
      array = draw.standard_normal(leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
    else:
      array = draw.standard_normal(leaf.shape) * 0.05
    damped = any(getattr(key, "key", None) == "sep3" for key in path)  # As in FIXTURES.md: 16 units add up.
    return jnp.asarray(array * (0.2 if damped and name == "kernel" else 1), leaf.dtype)

  graphdef, state = nnx.split(model)
  values = jax.tree_util.tree_map_with_path(value, nnx.to_pure_dict(state))
  nnx.replace_by_pure_dict(state, values)
  return graphdef, state


def lively_model(num_classes=3, **options):
  """run(image, silent=(), **call) -> logits, end points; the batch norms at the paths `silent` give 0."""
  graphdef, state = lively_state(
    nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=num_classes, rngs=nnx.Rngs(0), **options))
  )

  @functools.partial(jax.jit, static_argnames="train")
  def forward(state, image, train=False, key=None):
    endpoints = {}
    return nnx.merge(graphdef, state, copy=True)(image, train=train, key=key, endpoints=endpoints), endpoints

  def run(image, silent=(), **call):
    values = traverse_util.flatten_dict(nnx.to_pure_dict(state), sep="/")
    for name in (f"{path}/{leaf}" for path in silent for leaf in ("scale", "bias")):
      values[name] = jnp.zeros_like(values[name])
    changed = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(changed, traverse_util.unflatten_dict(values, sep="/"))
    with jax.default_matmul_precision("highest"):
      return forward(changed, image, **call)

  return run


def noise(*shape, seed=0):
  return jax.random.uniform(jax.random.key(seed), shape, minval=-1, maxval=1)


SMALL = dict(backbone="mobilenet_v2")


@pytest.mark.parametrize("size", [(33, 49), (32, 46), (31, 20), (1, 7)])
@pytest.mark.parametrize("output_stride", [8, 32])
def test_logits_have_the_images_size_whatever_it_is(size, output_stride):
  def forward(image):
    model = models.build("deeplab_v3plus", num_classes=3, output_stride=output_stride, rngs=nnx.Rngs(0), **SMALL)
    return model(image), model(image, upsample=False)

  large, small = jax.eval_shape(forward, jax.ShapeDtypeStruct((2, *size, 3), jnp.float32))
  assert large.shape == (2, *size, 3) and small.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 3)
  assert large.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("backbone, last", [("xception_41", "exit_block1/unit1"), ("mobilenet_v2", "layer_17")])
def test_output_strides_agree_where_they_sample_the_same_pixel(backbone, last):
  """Rates put each tap on the pixel it would see at a larger stride, so dense features are those, and more between."""
  image, options = noise(1, 65, 97, 3), dict(backbone=backbone, decoder=False, atrous_rates=())
  at = {stride: lively_model(output_stride=stride, **options)(image)[1] for stride in (8, 16, 32)}
  end = "exit_block2/unit1" if backbone == "xception_41" else "layer_18"
  for name in (last, end):
    scale = float(jnp.abs(at[8][name]).max())
    np.testing.assert_allclose(at[8][name][:, ::2, ::2], at[16][name], atol=1e-5 * scale)
    np.testing.assert_allclose(at[16][name][:, ::2, ::2], at[32][name], atol=1e-5 * scale)


def test_strides_become_rates_one_layer_late():
  # Xception-65 by block, and what FACTS.md says of it.
  blocks = [2, 2, 2, 1, 2, 1]
  assert strides.strides_to_rates(blocks, 16) == [(2, 1), (2, 1), (2, 1), (1, 1), (2, 1), (1, 1)]
  assert strides.strides_to_rates(blocks, 8) == [(2, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 2)]
  assert strides.strides_to_rates(blocks, 4) == [(2, 1), (2, 1), (1, 1), (1, 2), (1, 2), (1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("separable", [True, False])
def test_aspp_branches_look_as_far_as_their_rates(separable):
  rates, size = (2, 3, 5), 13
  options = dict(backbone="mobilenet_v2", atrous_rates=rates, separable=separable)
  model = nnx.merge(
    *lively_state(nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=2, rngs=nnx.Rngs(0), **options)))
  )
  impulse = jnp.zeros((1, size, size, 320)).at[0, size // 2, size // 2].set(1.0)
  ends, still = {}, {}
  model.aspp(impulse, False, None, ends)
  model.aspp(jnp.zeros_like(impulse), False, None, still)
  for n, rate in enumerate(rates, start=1):
    name = f"aspp/branch{n}/depthwise" if separable else f"aspp/branch{n}"
    rows, cols = np.nonzero(np.abs(ends[name] - still[name]).max((0, 3)))
    assert set(rows - size // 2) == set(cols - size // 2) == {-rate, 0, rate} and len(rows) == 9


@pytest.mark.slow
def test_every_branch_changes_the_logits():
  run, image = lively_model(atrous_rates=(1, 2, 3), **SMALL), noise(1, 65, 65, 3)
  whole, _ = run(image)
  for path in ("aspp/pooling/norm", "aspp/branch0/norm", "aspp/branch1/pointwise_norm", "aspp/branch2/pointwise_norm",
               "aspp/branch3/pointwise_norm", "decoder/low_level/norm"):  # fmt: skip
    assert float(jnp.abs(run(image, [path])[0] - whole).max()) > 1e-3 * float(whole.std()), path


@pytest.mark.slow
def test_order_of_the_batch_does_not_matter():
  run, image = lively_model(**SMALL), noise(3, 40, 33, 3)
  order = jnp.asarray([2, 0, 1])
  for train in (False, True):
    logits, _ = run(image, train=train)
    np.testing.assert_allclose(
      run(image[order], train=train)[0], logits[order], atol=(1e-2 if train else 1e-4) * float(logits.std())
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(backbone="xception_41"), SMALL], ids=["xception_41", "mobilenet_v2"])
def test_mirrored_kernels_give_a_mirrored_image_mirrored_logits(options):
  """For odd sizes, where every padding has two equal sides; a wrong tap, crop or resize position breaks it."""
  graphdef, state = lively_state(
    nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=3, rngs=nnx.Rngs(0), **options))
  )
  mirrored = jax.tree.map(lambda x: x[:, ::-1] if x.ndim == 4 else x, state)
  forward = jax.jit(lambda state, image: nnx.merge(graphdef, state)(image))
  image = noise(1, 49, 65, 3)
  with jax.default_matmul_precision("highest"):
    logits, flipped = forward(state, image), forward(mirrored, image[:, :, ::-1])
  np.testing.assert_allclose(flipped[:, :, ::-1], logits, atol=1e-4 * float(logits.std()))


@pytest.mark.slow
def test_training_drops_out_only_with_a_key():
  run, image = lively_model(**SMALL, bn_momentum=0.9), noise(2, 33, 33, 3)
  plain, again = run(image, train=True)[0], run(image, train=True)[0]
  dropped = run(image, train=True, key=jax.random.key(1))[0]
  np.testing.assert_array_equal(plain, again)
  assert not np.allclose(plain, dropped)
  np.testing.assert_array_equal(run(image, key=jax.random.key(1))[0], run(image)[0])


@pytest.mark.slow
def test_bfloat16_logits_stay_within_two_percent():
  """Of an Xception. MobileNetV2's linear bottlenecks magnify roundings: 8 % on seeded weights."""
  image = noise(1, 65, 65, 3)
  wide, narrow = (lively_model(backbone="xception_41", dtype=dtype)(image)[0] for dtype in ("float32", "bfloat16"))
  assert narrow.dtype == jnp.float32
  assert float(jnp.linalg.norm(narrow - wide) / jnp.linalg.norm(wide)) < 2e-2


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(output_stride=12), "model.output_stride = 12: choose 8, 16 or 32."),
    (dict(backbone="xception_42"), "model.backbone = 'xception_42': choose one of xception_41, "),
    (dict(atrous_rates=(6, 0)), "model.atrous_rates = (6, 0): give whole numbers from 1"),
    (dict(atrous_rates="six"), "model.atrous_rates = "),
    (dict(multi_grid=(1, 2)), "model.multi_grid = (1, 2): give three whole numbers"),
    (dict(multi_grid=(1, 2, 4), **SMALL), "model.multi_grid = (1, 2, 4): mobilenet_v2 has none"),
    (dict(depth_multiplier=0.5), "model.depth_multiplier = 0.5: only mobilenet_v2 has one, leave it at 1.0."),
    (dict(depth_multiplier=0.0, **SMALL), "model.depth_multiplier = 0.0 must be above 0."),
    (dict(details=dict(mobilenet_divisor=-8), **SMALL), "model.details.mobilenet_divisor = -8 must be 0 or more"),
    (dict(dropout=1.0), "model.dropout = 1.0 must lie in [0, 1)."),
    (dict(bn_momentum=1.0), "model.bn_momentum = 1.0 must lie in [0, 1)."),
    (dict(details=dict(normalization="unit")), "model.details.normalization = 'unit': choose one of auto, symmetric, "),
    (dict(details=dict(decoder_convs=0)), "model.details.decoder_convs = 0 must be at least 1."),
    (
      dict(details=dict(mobilenet_padding="fixed")),
      "model.details.mobilenet_padding = 'fixed': xception_65 has no such detail, leave it out.",
    ),
  ],
)
def test_wrong_options_say_what_is_right(options, message):
  with pytest.raises(ValueError) as error:
    models.build("deeplab_v3plus", num_classes=21, rngs=nnx.Rngs(0), **options)
  assert message in str(error.value)
