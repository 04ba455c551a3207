"""What predicting needs to know of a run beside its weights: class names, colours, canvas and EXIF rule.

Training keeps it in the workdir, so that a copy of the workdir predicts where the data set is not.
"""

import dataclasses
import json
import pathlib

import numpy as np

from segjax import config as config_lib
from segjax import input_pipeline
from segjax.config import ConfigError
from segjax.files import atomic
from segjax.input_pipeline import images
from segjax.input_pipeline.sources import datasets

INFO_FILE = "task.json"  # In the workdir, beside the config.


@dataclasses.dataclass(frozen=True)
class PredictionInfo:
  """See the module.

  Attributes:
    classes: names in the order of ids.
    palette: [K, 3] uint8.
    canvas_size: (H, W) that evaluation pads images to, but for those that are larger; None where it is not known.
    exif: the rule for images that EXIF wants turned, see `images.Reading`: "refuse", "apply" or "ignore".
  """

  classes: tuple[str, ...]
  palette: np.ndarray
  canvas_size: tuple[int, int] | None
  exif: str

  def save(self, workdir: pathlib.Path) -> None:
    """Writes `workdir`/task.json, whole or not at all."""
    colors = [bytes(color).hex().upper() for color in self.palette]
    content = dict(classes=self.classes, colors=colors, canvas_size=self.canvas_size, exif=self.exif)
    atomic.write_text(workdir / INFO_FILE, json.dumps(content, indent=2) + "\n")


def of_split(source, data) -> PredictionInfo:
  """From the source of the evaluation's split of `config.data`."""
  canvas = input_pipeline.eval_canvases(source, data)[0]
  return PredictionInfo(source.classes, source.palette, canvas, source.exif)


def load(workdir: pathlib.Path) -> PredictionInfo:
  """Reads what `PredictionInfo.save` wrote.

  Raises:
    ConfigError: the file is damaged.
  """
  path = workdir / INFO_FILE
  try:
    saved = json.loads(path.read_text())
    palette = datasets.parse_colors(saved["colors"])
    if len(palette) != len(saved["classes"]):
      raise ValueError(f"{len(palette)} colours for {len(saved['classes'])} classes")
    if saved["exif"] not in images.EXIF_RULES:
      raise ValueError(f"exif {saved['exif']!r}")
    height, width = saved["canvas_size"]
    return PredictionInfo(tuple(saved["classes"]), palette, (int(height), int(width)), saved["exif"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f"{path} cannot be used ({error}). Restore it, or repeat the run's training command, which writes it again (a"
      " complete run trains no further)."
    ) from error


def _saved(config, workdir: pathlib.Path | None) -> PredictionInfo | None:
  """What the run in `workdir` saved; without a run there, the one that `init.path` names. None where neither did."""
  has_run = workdir is not None and (workdir / config_lib.CONFIG_FILE).exists()
  origin = workdir if has_run else pathlib.Path(config.init.path).expanduser()
  return load(origin) if (origin / INFO_FILE).exists() else None


def exif_rule(config, workdir: pathlib.Path | None) -> str:
  """The EXIF rule of `of_run`, which here needs no class names.

  Raises:
    ConfigError: a damaged file.
  """
  saved = _saved(config, workdir)
  return saved.exif if saved and config.data.exif == "refuse" else config.data.exif


def of_run(config, workdir: pathlib.Path | None) -> PredictionInfo:
  """Of the run in `workdir`; without one, of the run that `init.path` names; else from the config alone.

  `data.canvas_size` and `data.exif` go before what was saved, as they do in evaluation.

  Raises:
    ConfigError: a damaged file.
    DataError: neither a run, the config nor the data set names the classes.
  """
  info = _saved(config, workdir) or PredictionInfo(*input_pipeline.named_classes(config.data), None, "refuse")
  canvas_size = tuple(config.data.canvas_size) if any(config.data.canvas_size) else info.canvas_size
  return dataclasses.replace(info, canvas_size=canvas_size, exif=exif_rule(config, workdir))
