"""The order of examples: golden values, permutations, and independence of hosts."""

import numpy as np
import pytest

from segjax.input_pipeline import order


def test_order_is_what_it_was_when_written():
  """Golden values: a change here would silently break the resumption of every existing run."""
  assert int(order.mix(1, 2)) == 0xBCD9DBB49673066B
  assert order.permutation(0, 0, 10).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
  assert order.train_ids(7, 3, 4, 5).tolist() == [2, 4, 3, 2]


def test_each_epoch_is_a_fresh_permutation():
  stream = np.concatenate([order.train_ids(3, step, 6, 10) for step in range(5)])  # 30 positions: three epochs.
  epochs = stream.reshape(3, 10)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
  assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_seed_changes_the_order_and_step_alone_decides_the_batch():
  assert order.train_ids(0, 5, 8, 100).tolist() != order.train_ids(1, 5, 8, 100).tolist()
  order.permutation.cache_clear()
  late = order.train_ids(0, 1000, 8, 100)
  order.permutation.cache_clear()
  for step in range(3):
    order.train_ids(0, step, 8, 100)
  np.testing.assert_array_equal(late, order.train_ids(0, 1000, 8, 100))


def test_a_batch_larger_than_the_data_set_spans_epochs():
  ids = order.train_ids(0, 0, 7, 3)
  assert sorted(ids[:3]) == sorted(ids[3:6]) == [0, 1, 2]


def test_every_position_is_about_equally_likely():
  firsts = np.bincount([order.permutation(0, epoch, 8)[0] for epoch in range(4000)], minlength=8)
  assert firsts.min() > 400 and firsts.max() < 600


def test_evaluation_shows_every_example_once_and_pads_the_last_batch():
  steps = order.num_eval_steps(4, 10)
  ids = np.concatenate([order.eval_ids(step, 4, 10) for step in range(steps)])
  assert steps == 3 and ids.tolist() == [*range(10), order.PADDING, order.PADDING]


def counts_of(shares, num_examples=40):
  """[N, K] pixels per class: class c is in the examples whose number its period divides, and has that share of the pixels."""
  counts = np.zeros((num_examples, len(shares)), np.int64)
  for c, (share, period) in enumerate(shares):
    held = np.arange(num_examples) % period == 0
    counts[held, c] = 1_000_000 * share / held.sum()
  return counts


SHARES = ((0.9, 1), (0.08, 2), (0.02, 20))


def test_class_balanced_draws_are_what_they_were_when_written():
  """Golden values, as of the order of epochs."""
  balance = order.ClassBalance(counts_of(SHARES), 0.05)
  assert order.train_ids(7, 3, 6, 40, balance).tolist() == [0, 0, 26, 20, 0, 20]


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_classes_are_drawn_as_daformer_draws_them_and_their_examples_alike(temperature):
  counts = counts_of(SHARES)
  balance = order.ClassBalance(counts, temperature)
  frequency = np.array([share for share, _ in SHARES])
  want = np.exp((1 - frequency) / temperature) / np.exp((1 - frequency) / temperature).sum()
  np.testing.assert_allclose(balance.probabilities, want, rtol=1e-4)
  ids = np.concatenate([order.train_ids(0, step, 100, 40, balance) for step in range(200)])
  drawn = np.bincount(ids, minlength=40) / len(ids)
  expected = ((counts > 0) / (counts > 0).sum(0)) @ want
  np.testing.assert_allclose(drawn, expected, atol=4 * np.sqrt(expected.max() / len(ids)))


def test_class_balanced_steps_follow_from_seed_and_step_alone():
  balance, again = (order.ClassBalance(counts_of(SHARES), 0.05) for _ in range(2))
  whole = balance.draw(3, np.arange(24))
  np.testing.assert_array_equal(order.train_ids(3, 2, 8, 40, again), whole[16:])
  assert order.train_ids(4, 2, 8, 40, again).tolist() != whole[16:].tolist()
