"""model_card.md: what an exported network is, for whom it meets without the run. As Hugging Face's model cards are laid out."""

import json

from segjax import config as config_lib
from segjax.tools.exports.formats import FORMATS
from segjax.tools.exports.program import Program

_HIDDEN = ("data.dir", "data.cache", "data.loader", "data.workers")  # Of the machine, not of the network.


def card(program: Program, name: str, checks: dict[str, str], record: dict | None, origin: dict, license: str) -> str:
  """The page.

  Args:
    name: of the model.
    checks: {format: what its check found}.
    record: of the evaluation of these weights, see `record.newest`; None where there is none.
    origin: of this export, see `record.origin`.
    license: of the weights, an identifier of Hugging Face's or words; "": not stated.
  """
  config, classes = program.experiment.config, program.info.classes
  pairs = config_lib.changed(config_lib.fields(config))
  changed = {field: value for field, (value, _) in pairs.items() if field not in _HIDDEN}
  return "\n\n".join(
    (
      _header(license),
      f"# {name}",
      f"{config.model.name}, trained with segjax on {config.data.name} data"
      f" ({config.data.train_split}), to tell {len(classes)} classes apart. Weights: {program.origin}.",
      "## Files\n\n" + "\n".join(_file(program, format, found) for format, found in checks.items()),
      "Ids count the classes below from 0. Images are as in their files, values not scaled; larger ones are to be cut"
      " into parts or shrunk before.",
      "## Classes\n\n| id | class | colour |\n|---|---|---|\n"
      + "\n".join(f"| {i} | {c} | {_color(p)} |" for i, (c, p) in enumerate(zip(classes, program.info.palette))),
      "## Scores\n\n" + _scores(record),
      "## How it came about\n\n" + _origin(record, origin),
      "Options that are not segjax' defaults:\n\n```json\n" + json.dumps(changed, indent=2, default=list) + "\n```",
      "## Licence\n\n" + (license or "Not stated. The terms of the data that it was trained on apply."),
    )
  ) + "\n"  # fmt: skip


def _header(license: str) -> str:
  lines = ["library_name: segjax", "pipeline_tag: image-segmentation", "tags: [jax, semantic-segmentation]"]
  return "\n".join(("---", *lines, *[f"license: {license}"] * bool(license), "---"))


def _file(program: Program, format: str, found: str) -> str:
  (height, width), pixels = program.canvas, program.pixels
  batch = 1 if format == "litert" else "batch"
  sizes = dict(height=height, width=width, channels=pixels.count, dtype=pixels.dtype, classes=len(program.info.classes))
  return f"* `{FORMATS[format].file}`: {FORMATS[format].interface.format(batch=batch, **sizes)} {found}"


def _color(rgb) -> str:
  return "#" + bytes(rgb).hex()


def _scores(record: dict | None) -> str:
  if record is None:
    return "Not evaluated."
  rows = [f"| {name} | {value:.4f} |" for name, value in record["scores"].items() if value is not None]
  return (
    f"Of {record['images']} images of {record['split']}, at step {record['step']}.\n\n| score | value |\n|---|---|\n"
    + "\n".join(rows)
  )


def _origin(record: dict | None, origin: dict) -> str:
  made = {"exported": origin} | ({"evaluated": record} if record else {})
  return "\n".join(
    f"* {what} {x['date']} by `{x['command']}`, segjax {x['versions']['segjax']}{x['commit'] and ' at ' + x['commit']},"
    f" jax {x['versions']['jax']}"
    for what, x in made.items()
  )
