"""milesial's bilinear U-Net: our numbers are those of an independent implementation in torch."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import seeded, test_peers

CASE = "milesial_unet_bilinear"


@pytest.mark.full
def test_bilinear_logits_equal_an_independent_torch_implementation():
  torch = pytest.importorskip("torch")
  functional = torch.nn.functional
  w = seeded.torch_weights(test_peers.shapes(CASE), 1.0)
  w = {key: torch.from_numpy(array).double() for key, array in w.items()}

  def double(x, name):
    for n in (0, 3):
      x = functional.conv2d(x, w[f"{name}.double_conv.{n}.weight"], padding=1)
      norm = (w[f"{name}.double_conv.{n + 1}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
      x = torch.relu(functional.batch_norm(x, *norm))
    return x

  image = np.random.default_rng(0).standard_normal([1, 3, 64, 96]).astype(np.float32)
  skips = [double(torch.from_numpy(image).double(), "inc")]
  for n in range(1, 5):
    skips.append(double(functional.max_pool2d(skips[-1], 2), f"down{n}.maxpool_conv.1"))
  x = skips.pop()
  for n in range(1, 5):
    x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    x = double(torch.cat([skips.pop(), x], 1), f"up{n}.conv")
  want = functional.conv2d(x, w["outc.conv.weight"], w["outc.conv.bias"]).numpy().transpose(0, 2, 3, 1)
  got, _ = test_peers.forward(test_peers.seeded_model(CASE, 1.0), jnp.asarray(image.transpose(0, 2, 3, 1)))
  np.testing.assert_allclose(got, want, atol=1e-4)
