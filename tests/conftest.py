"""For every test: eight fake CPU devices, no implicit rank promotion, and one compilation of each program."""

import gc
import os
import pathlib
import tempfile

# Before JAX is imported; processes that tests start inherit it. Nearly all time is XLA's, compiling programs that run for a
# moment, and half of that is LLVM's optimisation: tests do without, unless the environment's XLA_FLAGS say otherwise. Many
# tests train the same tiny network, so a compilation cache saves more: of this session, or, where the environment names
# one, of all.
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_backend_optimization_level=0",
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
  )
)
os.environ["JAX_PLATFORMS"] = "cpu"
_CACHE = tempfile.TemporaryDirectory()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

gc.set_threshold(100_000, 20, 100)  # Traces are many objects that live on: looking for garbage takes a tenth of all.

import jax  # noqa: E402
import pytest  # noqa: E402

from segjax.config import default_config  # noqa: E402
from tests.marks import SUITES  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
  """A test is of one suite at most, so that the commands of pyproject.toml and .ci/run have each once."""
  for item in items:
    if len(suites := [mark for mark in SUITES if item.get_closest_marker(mark)]) > 1:
      raise pytest.UsageError(f"{item.nodeid} is marked {' and '.join(suites)}: choose one")


ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture
def shared():
  """The folder of reference numbers and real images beside the checkout; tests that need it skip without it."""
  if not SHARED.is_dir():
    pytest.skip(f"{SHARED} is not there (reference numbers and images are no part of the project)")
  return SHARED


def make_tiny_config():
  """A run of seconds: 6 steps of a small U-Net, with everything on that a resume has to get right."""
  config = default_config(model="unet", data="synthetic")
  config.num_steps = 6
  config.mesh.data = 1
  config.batch_size = 8
  config.crop_size = (16, 24)
  config.log_every = 2
  config.eval_every = 3
  config.checkpoint_every = 3
  config.data.image_size = (24, 32)
  config.data.num_train = 20
  config.data.num_val = 5
  config.data.workers = 2
  config.model.width = 4
  config.model.depth = 2
  config.model.dropout = 0.3
  config.augment.brightness = 0.2
  config.augment.hue = 0.1
  config.optimizer.ema_decay = 0.9
  config.eval.batch_size = 8
  config.eval.num_overlays = 2
  return config


@pytest.fixture
def tiny_config():
  """A new one of `make_tiny_config`."""
  return make_tiny_config()
