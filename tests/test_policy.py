"""Binary tasks and training policies, through whole runs: threshold, plateau, early stop, best by any score, resumes."""

import numpy as np
import pytest
from PIL import Image

from segjax import evaluate as evaluate_lib
from segjax import optimizer
from segjax import train as train_lib
from segjax.config import ConfigError, default_config
from segjax.run.checkpoint import Checkpoints
from tests.test_train import assert_identical, checkpoint, read_metrics


def test_the_plateau_and_the_stale_count_by_hand():
  policy, scales, stale = optimizer.init_policy(), [], []
  for score in (0.5, 0.5, 0.50005, 0.6, float("nan"), 0.6, 0.55, 0.61):
    policy = optimizer.update_policy(policy, score, min_gain=1e-3, plateau_factor=0.1, plateau_patience=2)
    scales.append(round(float(optimizer.plateau_scale(policy)), 6))
    stale.append(int(policy["stale"]))
  assert stale == [0, 1, 2, 0, 1, 2, 3, 0]
  assert scales == [1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
  assert float(policy["best"]) == pytest.approx(0.61)


def policy_config(config, tmp_path):
  config.eval_every, config.checkpoint_every, config.num_steps = 1, 1, 6
  config.optimizer.schedule = "constant"
  config.policy.min_gain = 1.0  # Nothing after the first evaluation ever counts as a gain.
  config.policy.plateau_factor, config.policy.plateau_patience = 0.5, 2
  return config


@pytest.mark.full
def test_plateaus_survive_a_resume_bit_for_bit(tiny_config, tmp_path):
  config = policy_config(tiny_config, tmp_path)
  train_lib.train(config, tmp_path / "whole")
  config.num_steps = 4
  train_lib.train(config, tmp_path / "broken")
  config.num_steps = 6
  train_lib.train(config, tmp_path / "broken")
  assert_identical(checkpoint(tmp_path / "whole", 6), checkpoint(tmp_path / "broken", 6))
  rates = [line["train/learning_rate"] for line in read_metrics(tmp_path / "whole") if "train/loss" in line]
  np.testing.assert_allclose(rates, [0.01, 0.01, 0.01, 0.005, 0.005, 0.0025], rtol=1e-6)


@pytest.mark.full
def test_early_stopping_ends_the_run_and_stays_ended(tiny_config, tmp_path, capsys):
  config = policy_config(tiny_config, tmp_path)
  config.policy.plateau_factor, config.policy.early_stop = 1.0, 2
  train_lib.train(config, tmp_path / "run")
  assert "stopped early: no gain in val/mean_iou over 2 evaluations" in capsys.readouterr().out
  assert Checkpoints(tmp_path / "run", read_only=True).latest_step() == 3
  assert train_lib.train(config, tmp_path / "run") == {}
  assert "raise --config.policy.early_stop" in capsys.readouterr().out
  config.policy.early_stop = 0
  train_lib.train(config, tmp_path / "run")
  assert Checkpoints(tmp_path / "run", read_only=True).latest_step() == 6


@pytest.mark.full
def test_the_best_checkpoint_is_that_of_the_chosen_score(tiny_config, tmp_path):
  config = policy_config(tiny_config, tmp_path)
  config.policy.metric, config.keep_checkpoints = "iou/disk", 1
  train_lib.train(config, tmp_path / "run")
  lines = [line for line in read_metrics(tmp_path / "run") if "val/iou/disk" in line]
  best = max(lines, key=lambda line: (line["val/iou/disk"] or 0, line["step"]))
  checkpoints = Checkpoints(tmp_path / "run", read_only=True)
  assert checkpoints.best_score() == pytest.approx(best["val/iou/disk"])
  kept = {int(p.name.removeprefix("step_")) for p in (tmp_path / "run/checkpoints").iterdir()}
  assert kept == {checkpoints.best_step(), 6}


def test_a_score_that_does_not_exist_is_refused_with_those_that_do(tiny_config, tmp_path):
  tiny_config.policy.metric = "val_loss"
  with pytest.raises(ConfigError, match="config.policy.metric = 'val_loss': choose one of mean_iou, .*iou/disk"):
    train_lib.train(tiny_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def binary(tmp_path, monkeypatch):
  """A run of a one-logit U-Net on bright discs, with the weight map and an unpadded network."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  rng = np.random.default_rng(0)
  for folder in ("images", "masks"):
    (tmp_path / "data" / folder).mkdir(parents=True)
  y, x = np.mgrid[:32, :32]
  for i in range(10):
    mask = np.zeros((32, 32), np.uint8)
    for _ in range(3):
      row, col = rng.integers(4, 28, 2)
      mask[(y - row) ** 2 + (x - col) ** 2 < 20] = 255
    image = rng.normal(60 + 0.6 * mask[..., None], 10, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / f"data/images/{i}.png")
    Image.fromarray(mask).save(tmp_path / f"data/masks/{i}.png")
  config = default_config(model="unet", data="folder")
  config.data.update(
    dir=str(tmp_path / "data"),
    images="images",
    masks="masks",
    classes=("ground", "disc"),
    label_map="255:1",
    folds=5,
    instances="components",
    loader="grain",
    workers=2,
  )
  config.num_steps, config.eval_every, config.checkpoint_every, config.log_every = 40, 40, 40, 20
  config.batch_size, config.eval.batch_size, config.mesh.data, config.crop_size = 4, 2, 1, (16, 16)
  config.model.update(width=4, depth=1, padding="valid", batch_norm=False)
  config.head = "sigmoid"
  config.loss.update(terms=("bce", "dice:0.5"), border_weight=2.0)
  config.augment.update(scale=(1.0, 1.0), rotation=90.0, elastic=1.0, outside="mirror")
  config.optimizer.update(name="adamw", base_lr=0.01, schedule="constant")
  config.policy.metric = "foreground_iou"
  return config


@pytest.mark.full
def test_a_one_logit_network_learns_discs_and_its_threshold_can_be_moved(binary, tmp_path, capsys):
  scores = train_lib.train(binary, tmp_path / "run")
  output = capsys.readouterr().out
  assert "foreground (disc): IoU" in output and "best threshold here: eval.threshold=" in output
  assert scores["val/foreground_iou"] > 0.6
  iou = scores["val/foreground_iou"]
  assert scores["val/foreground_dice"] == pytest.approx(2 * iou / (1 + iou)) and scores["val/iou/disc"] == iou
  # The sweep's best is what that threshold then gives, and tiles and mirror views take part.
  line = next(line for line in output.splitlines() if "best threshold here" in line)
  binary.eval.threshold = float(line.split("eval.threshold=")[1].split(",")[0])
  again = evaluate_lib.evaluate(binary, tmp_path / "run")
  assert 100 * again["val/foreground_iou"] == pytest.approx(float(line.split()[-1]), abs=0.006)
  assert again["val/foreground_iou"] >= iou
  binary.eval.window, binary.eval.window_stride = (12, 12), (12, 12)
  assert evaluate_lib.evaluate(binary, tmp_path / "run")["val/foreground_iou"] == pytest.approx(
    again["val/foreground_iou"], abs=1e-3
  )
  binary.eval.flip = True
  assert evaluate_lib.evaluate(binary, tmp_path / "run")["val/foreground_iou"] > 0.6


def test_heads_and_losses_that_do_not_fit_are_refused_before_anything_is_written(binary, tiny_config, tmp_path):
  binary.loss.terms = ("cross_entropy",)
  with pytest.raises(ConfigError, match="with head = 'sigmoid', use bce"):
    train_lib.train(binary, tmp_path / "run")
  tiny_config.head, tiny_config.loss.terms = "sigmoid", ("bce",)
  with pytest.raises(ConfigError, match="but the data set has 6 classes. Set head = 'softmax'"):
    train_lib.train(tiny_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
