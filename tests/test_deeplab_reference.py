"""DeepLabV3+ against the logits and end points of the official TensorFlow code, on weights seeded by name."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from segjax import inference, models, pretrained
from segjax.models import resize
from tests import seeded
from tests.marks import full

# Fixture: variable table, and the options in which it differs from the defaults. Absent ones are skipped.
CASES = {
  "a_x65_os16_65x65": ("xception65", {}),
  "b_x65_os16_129x129": ("xception65", {}),
  "c_x65_os8_97x97": ("xception65", dict(output_stride=8)),
  "d_x65_os16_65x97": ("xception65", {}),
  "e1_x41_os16_65x65": ("xception41", dict(backbone="xception_41")),
  "e2_x71_os16_65x65": ("xception71", dict(backbone="xception_71")),
  "f_mnv2_os16_65x65": ("mobilenetv2", dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False)),
  "f2_mnv2_os8_65x97": ("mobilenetv2", dict(backbone="mobilenet_v2", atrous_rates=(), decoder=False, output_stride=8)),
  "g_x65_os16_64x80_even": ("xception65", {}),
  "h_x65_os32_129x97": ("xception65", dict(output_stride=32)),
  "i_x65_os16_65x65_nodecoder": ("xception65", dict(decoder=False)),
  "k_x65_os16_65x65_noSC": ("xception65_noSC", dict(separable=False)),
  "l_x65_os16_65x65_noimagelevel": ("xception65", dict(image_pooling=False)),
  "m_x65_os16_65x65_multigrid124": ("xception65", dict(multi_grid=(1, 2, 4))),
}
IN_TREE = ("e1_x41_os16_65x65", "f_mnv2_os16_65x65", "g_x65_os16_64x80_even")  # Reduced copies in tests/data.

# The official end points' names as regular expressions, and ours.
ENDPOINTS = (
  (r"input", "image"),
  (r"image_pooling", "aspp/pooling"),
  (r"aspp_concat", "aspp/concat"),
  (r"concat_projection", "aspp/projection"),
  (r"aspp(\d)_dw", r"aspp/branch\1/depthwise"),
  (r"aspp(\d)", r"aspp/branch\1"),
  (r"feature_projection0", "decoder/low_level"),
  (r"decoder_concat", "decoder/concat"),
  (r"decoder_conv(\d)_dw", lambda match: f"decoder/conv{int(match[1]) + 1}/depthwise"),
  (r"decoder_conv(\d)", lambda match: f"decoder/conv{int(match[1]) + 1}"),
  (r"middle_unit(\d+)", r"middle_block1/unit\1"),
  (r"((?:entry|exit)_block\d)_sep(\d)_dw(?:_bn)?", r"\1/unit1/sep\2/depthwise"),
  (r"((?:entry|exit)_block\d)_sep(\d)_pw(?:_bn)?", r"\1/unit1/sep\2"),
  (r"((?:entry|exit)_block\d)_shortcut", r"\1/unit1/shortcut"),
  (r"((?:entry|exit)_block\d)", r"\1/unit1"),
  (r"(layer_\d+)_depthwise_output", r"\1/depthwise"),
)


def our_name(endpoint, model):
  if endpoint == "low_level_stride4":
    return model.backbone.low_level
  for pattern, ours in ENDPOINTS:
    if re.fullmatch(pattern, endpoint):
      return re.sub(pattern, ours, endpoint)
  return endpoint


def seeded_model(table, **options):
  """A DeepLabV3+ with seeded weights; the tables know nothing of heads without a decoder or image pooling."""
  model = nnx.eval_shape(lambda: models.build("deeplab_v3plus", num_classes=21, rngs=nnx.Rngs(0), **options))
  arrays = seeded.arrays(table)
  for option, scope in (("decoder", "decoder/"), ("image_pooling", "image_pooling/")):
    if not options.get(option, True):
      arrays = {name: array for name, array in arrays.items() if not name.startswith(scope)}
  if not options.get("image_pooling", True):
    name = "concat_projection/weights"
    arrays[name] = seeded.value(name, (1, 1, 1024, 256))
  pretrained.assign(model, arrays, "tf_deeplab")
  return model


def run(model, raw):
  """End points, logits and the image-sized logits; at full float32 precision."""
  graphdef, state = nnx.split(model)

  @jax.jit
  def forward(state, raw):
    model, endpoints = nnx.merge(graphdef, state), {}
    logits = model(model.preprocess(raw), upsample=False, endpoints=endpoints)
    return endpoints, logits, resize.resize_bilinear(logits, raw.shape[1:3])

  with jax.default_matmul_precision("highest"):
    return jax.tree.map(np.asarray, forward(state, raw))


def check(case, z):
  table, options = CASES[case]
  model = seeded_model(table, **options)
  height, width = (json.loads(bytes(z["meta_json"]))[side] for side in ("height", "width"))
  endpoints, logits, upsampled = run(model, seeded.image(height, width))
  np.testing.assert_allclose(logits, z["logits"], atol=5e-4 if table == "mobilenetv2" else 1e-4, rtol=0)
  differs = upsampled.argmax(-1) != z["argmax"]
  if "argmax_margin" in z:
    differs &= z["argmax_margin"].reshape(differs.shape) > 1e-3  # Near ties may fall either way.
  assert not differs.any()
  names = [key.split("/")[1] for key in z.files if key.endswith("/stat")]
  assert len(names) >= 25
  for name in names:
    x, stat = endpoints[our_name(name, model)].astype(np.float64), z[f"ep/{name}/stat"]
    h, w = x.shape[1:3]
    rms = np.sqrt((x**2).mean())
    ours = dict(
      stat=np.array([x.mean(), x.std(), x.min(), x.max(), abs(x).mean(), rms]),
      tl=x[0, :2, :2, :16],
      br=x[0, -2:, -2:, -16:],
      mid=x[0, h // 2, w // 2, :64],
      chan_mean=x[0].mean((0, 1)),
      space_mean=x[0].mean(-1),
    )
    for part, got in ours.items():
      if f"ep/{name}/{part}" in z:
        want = z[f"ep/{name}/{part}"].reshape(got.shape)
        np.testing.assert_allclose(got, want, atol=1e-4 * stat[5], rtol=0, err_msg=f"{name}/{part}")


@pytest.mark.parametrize("case", [*IN_TREE[:2], *full(*IN_TREE[2:])])
def test_logits_and_end_points_equal_the_official_ones(case):
  check(case, np.load(seeded.DATA / f"tf_deeplab_{case}.npz"))


@pytest.mark.reference
@pytest.mark.parametrize("case", CASES)
def test_all_logits_and_end_points_equal_the_official_ones(case, shared):
  path = shared / "reference/deeplab/fixtures" / f"{case}.npz"
  if not path.is_file():
    pytest.skip(f"{path.name} is not among the reference numbers")
  check(case, np.load(path))


@pytest.mark.reference
def test_multi_scale_with_flips_equals_the_official_protocol(shared):
  """Six scales and mirror images at output stride 8: the mean of 12 softmaxes."""
  z = np.load(shared / "reference/deeplab/fixtures/j_x65_os8_65x97_multiscale_flip.npz")
  model, image = seeded_model("xception65", output_stride=8), seeded.image(65, 97)
  graphdef, state = nnx.split(model)

  @functools.partial(jax.jit, static_argnums=(2, 3))
  def probability(state, image, scale, mirrored):
    model = nnx.merge(graphdef, state)
    return jax.nn.softmax(inference.view_logits(model, model.preprocess(image), scale, mirrored))

  views = [(scale, mirrored) for scale in z["eval_scales"] for mirrored in (False, True)]
  assert len(views) == 12
  with jax.default_matmul_precision("highest"):
    shown = [np.asarray(probability(state, image, *view)) for view in views]
    options = dict(scales=tuple(z["eval_scales"][:2]), flip=True)  # Of all 12, compilation alone takes minutes.
    scores = inference.class_scores(model, model.preprocess(image), **options)
  np.testing.assert_allclose([p[0, 0, 0] for p in shown], z["per_branch_prob_at_0_0"], atol=1e-5)
  np.testing.assert_allclose([p[0, 32, 48] for p in shown], z["per_branch_prob_at_32_48"], atol=1e-5)
  mean = np.mean(shown, axis=0)
  np.testing.assert_allclose(mean[:, ::2, ::2], z["mean_prob"], atol=1e-5)
  assert not ((mean.argmax(-1) != z["argmax"]) & (z["argmax_margin"] > 1e-5)).any()
  np.testing.assert_allclose(scores, np.mean(shown[:4], axis=0), atol=1e-5)
