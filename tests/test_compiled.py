"""What XLA makes of each model's train step: guards of its speed that need no clock."""

import math
import re

import jax
import pytest

from segjax.experiment import Experiment
from segjax.tools import programs
from tests import experiment
from tests.experiment import mesh_of
from tests.marks import full

pytestmark = pytest.mark.parametrize("model", ["unet", *full("fcn", "deeplab")])
CANVAS = (22, 32)
SMALL = 1000  # Numbers in a map of a few pixels, of which jax 0.12 transposes one.
TRANSPOSE = re.compile(r" = \w+\[([\d,]+)\]\S* transpose\(")  # " = f32[16,8,12,4]{3,2,1,0} transpose("


@pytest.fixture(autouse=True)
def short_backbones(monkeypatch):
  experiment.shorten_backbones(monkeypatch)


def compiled(model, devices):
  """(experiment, train step) of a small network of each kind of layer."""
  config = experiment.make_config(model, "float32")
  if model == "unet":
    config.model.depth = 1  # Each of its layers is there.
  made = Experiment(config, mesh=mesh_of(devices))
  return made, programs.compile_train(made, CANVAS)


def test_it_gathers_no_activations_or_images(model):
  made, program = compiled(model, devices=8)
  print(model, {kind: (len(sizes), sum(sizes)) for kind, sizes in program.collectives.items() if sizes})
  # Sums; keys and scalars of the augmentation: a number or two for each example; and each device's mean and variance of what
  # a batch norm sees, which are as many numbers as all devices' running statistics.
  kinds = {kind for kind, sizes in program.collectives.items() if sizes}
  mixed = made.config.augment.class_mix > 0  # By which each device gets one crop of a neighbour's, and its label.
  assert "all-reduce" in kinds and kinds <= {"all-reduce", "all-gather"} | ({"collective-permute"} if mixed else set())
  assert sum(program.collectives["collective-permute"]) <= 4 * (3 + 1) * math.prod(made.config.crop_size)
  sizes = program.collectives["all-gather"]
  moments = 8 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.abstract_state.batch_stats))
  assert sum(size for size in sizes if size > 16 * made.config.batch_size) <= moments, sizes


@pytest.mark.full
def test_on_cpu_it_has_only_forms_that_run_fast_and_transposes_maps_only_to_resize_them(model):
  """Others take fifty times longer: convolutions in a layout of their own, or by groups; the maximum's gradient as XLA
  writes it. DeepLab resizes three maps along two axes, and their gradients, each by a product and what comes back from it; a
  convolution that wants another layout than its neighbours would double that. What XLA itself transposes, for the gradient
  of a dense kernel, it copies in passing, and is not counted.
  """
  made, program = compiled(model, devices=1)
  text = program.compiled.as_text()
  convolutions = "\n".join(line for line in text.splitlines() if " convolution(" in line)
  assert set(re.findall(r"dim_labels=(\w+)_\w+->(\w+)", convolutions)) == {("b01f", "b01f")}
  for slow in ("feature_group_count", "batch_group_count", "select-and-scatter(", " scatter(", " sort("):
    assert slow not in text, slow

  lines = [line for line in text.splitlines() if "jvp" in line]
  shapes = [tuple(map(int, dims.split(","))) for line in lines for dims in TRANSPOSE.findall(line)]
  maps = [
    shape for shape in shapes if len(shape) == 4 and shape[0] == made.config.batch_size and math.prod(shape) > SMALL
  ]
  assert len(maps) <= (16 if model == "deeplab" else 0), maps
