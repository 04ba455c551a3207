"""ClassMix: which pixels come from where, that every mesh mixes the same, and what it sends."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from segjax.augment import class_mix
from segjax.experiment import Experiment
from tests.experiment import mesh_of
from tests.marks import full

SIZE = (16, 24, 16, 3)


def crops(border=False):
  """Images and labels that tell their row of the batch and their place; labels of 0 to 6 classes, and void."""
  rng = np.random.default_rng(0)
  image = rng.uniform(0, 255, SIZE).astype(np.float32)
  label = np.stack([np.kron(rng.integers(0, max(i % 7, 1), (6, 4)), np.ones((4, 4), int)) for i in range(16)])
  label[:, :3], label[7] = 255, 255
  return image, label.astype(np.int32), rng.uniform(0, 9, SIZE[:3]).astype(np.float32) if border else None


@functools.cache
def compiled(probability):
  return jax.jit(functools.partial(class_mix.mix, probability=probability, num_classes=6))


def mixed(given, probability=1.0, seed=0):
  return compiled(probability)(jax.random.key(seed), given)


def test_half_of_the_classes_of_the_next_crop_are_pasted_whole_and_nothing_else():
  image, label, border = crops(border=True)
  out, classes, weight = map(np.asarray, mixed((image, label, border)))
  for i in range(16):
    there, here = (i + 1) % 16, i
    present = np.setdiff1d(label[there], [255])
    pasted = (out[i] == image[there]).all(-1)
    chosen = np.unique(label[there][pasted])
    assert len(chosen) == len(present) // 2 and 255 not in chosen
    np.testing.assert_array_equal(pasted, np.isin(label[there], chosen))  # All of a class, and of no other.
    for new, old in ((out, image), (classes, label), (weight, border)):
      mask = pasted.reshape(*pasted.shape, *(1,) * (new.ndim - 3))
      np.testing.assert_array_equal(new[i], np.where(mask, old[there], old[here]))


def test_each_class_is_pasted_half_the_time_and_a_share_of_the_crops_as_configured():
  label = np.tile(np.repeat(np.arange(4), 6).reshape(1, 24, 1), (16, 1, 16)).astype(np.int32)
  image = np.broadcast_to(np.arange(16, dtype=np.float32).reshape(-1, 1, 1, 1), SIZE)
  found = []
  for seed in range(40):
    out = np.asarray(mixed((image, label, None), 0.75, seed)[0])[:, ::6, 0, 0]
    found.append(out != image[:, ::6, 0, 0])  # [16, 4]: class c of crop i is the next one's.
  found = np.concatenate(found)
  assert set(found.sum(1)) == {0, 2} and abs(found.any(1).mean() - 0.75) < 0.06
  np.testing.assert_allclose(found.mean(0), 0.375, atol=0.06)
  assert len({tuple(row) for row in found}) == 7  # All pairs, and none.


@pytest.mark.parametrize("mesh", [(4, 2), *full(((1, 1),), ((2, 1),), ((8, 1),))], ids=str)
def test_every_mesh_mixes_the_same_bits_and_sends_one_crop_to_a_neighbour(mesh):
  given = crops()
  want = mixed(given)
  sharding = NamedSharding(mesh_of(*mesh), PartitionSpec("data"))
  put = jax.tree.map(lambda x: jax.device_put(x, sharding), given)
  program = compiled(1.0).lower(jax.random.key(0), put).compile()
  jax.tree.map(np.testing.assert_array_equal, program(jax.random.key(0), put), want)
  text = program.as_text()
  assert not re.search(r" (all-gather|all-reduce|all-to-all)(-start)?\(", text)
  sent = re.findall(r"\w+\[([\d,]+)\]\S* collective-permute", text)
  sent = sum(math.prod(map(int, shape.split(","))) for shape in sent)
  assert sent == (math.prod(SIZE[1:]) + math.prod(SIZE[1:3])) * (mesh[0] > 1)


def test_the_dtype_of_the_network_changes_no_crop(tiny_config):
  tiny_config.augment.update(class_mix=1.0, quarter_turns=True, flip_vertical=True, noise=0.1, blur=1.0, gamma=0.3)
  tiny_config.crop_size, found = (16, 16), []
  for tiny_config.dtype in ("float32", "bfloat16"):
    experiment = Experiment(tiny_config, mesh=mesh_of(1))
    batch = next(experiment.train_batches(0, 1))
    found.append(jax.jit(experiment.augment_batch)(jax.random.key(0), batch))
  assert found[1][0].dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, *found)
