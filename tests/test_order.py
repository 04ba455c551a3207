"""The order of examples: golden values, permutations, and independence of hosts."""

import numpy as np

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
