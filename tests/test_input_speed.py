"""The input benchmark: what its table says, and that generated data is what it claims to be."""

import pytest

from segjax.config import ConfigError, default_config
from segjax.input_pipeline import make_source
from segjax.tools import input_speed


def test_speed_counts_images_after_the_start_up():
  shown = []

  def batches():
    while True:
      shown.append(len(shown))
      sum(range(20000))  # Some CPU time.
      yield None

  wall, cpu = input_speed.speed(batches(), batch_size=7, seconds=0.2)
  counted = 7 * (len(shown) - 2)
  assert counted / 0.2 >= wall > 0.5 * counted / 0.2 and cpu >= 0.9 * wall


@pytest.mark.full
def test_the_table_has_a_row_for_each_format_and_loader(tmp_path, monkeypatch):
  monkeypatch.setattr(input_speed.prepare, "store_voc", lambda *_: None)  # Shards are another test's.
  formats = input_speed.generate_voc(tmp_path, 4)
  config = default_config(model="unet", data="voc")
  config.data.train_split, config.data.workers, config.batch_size = "trainaug", 1, 2
  table = input_speed.input_table(config, {"tree": formats["tree"]}, seconds=0.1).splitlines()
  assert [row.split(" | ")[:3] for row in table[2:5]] == [
    ["| tree", "none, decoding alone", "1"],
    ["| tree", "tf_data", "1"],
    ["| tree", "grain", "1"],
  ]
  assert all(float(cell) > 0 for row in table[2:5] for cell in row.rstrip(" |").split(" | ")[3:])
  assert "canvas 375x500, batches of 2" in table[-1]
  data = config.data
  data.dir = formats["tree"]
  source = make_source(data, "trainaug")
  assert len(source) == 4 and source.canvas_size == (375, 500) and source[0][1].max() == 255
  assert 90 < float(input_speed.file_sizes(formats["tree"], "*.jpg").split()[1]) < 120  # kB, as VOC's.


def test_only_benchmarks_are_generated():
  with pytest.raises(ConfigError, match="--generate makes voc or cityscapes, not synthetic"):
    input_speed.report(default_config(data="synthetic"), generate=2, seconds=0.1)
