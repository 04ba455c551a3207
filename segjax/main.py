"""The door: python -m segjax.main --config=configs/x.py --workdir=runs/x [--mode=train|eval|predict] [--config.a=b ...]

Only flags, process start and dispatch; the work is in functions of (config, workdir) that can be imported.
"""

import sys

from absl import app, flags

from segjax import commandline

_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ("train", "eval", "predict"),
  "train, or score a checkpoint of the workdir, or write its predictions for a server.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, curves, pictures.", required=True)


def main(argv: list[str]) -> None:
  """Dispatches; known errors end as one readable message, without a traceback."""
  if len(argv) > 1:
    raise app.UsageError(f"Unknown argument {argv[1]!r}; options look like --config.num_steps=100.")
  with commandline.readable_errors():
    config = commandline.config()

  # Not earlier: --help and config errors should not wait for these imports.
  import jax

  from segjax.evaluate import evaluate
  from segjax.predict import predict
  from segjax.train import NonFiniteLoss, train

  if config.dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  with commandline.readable_errors(NonFiniteLoss):
    {"train": train, "eval": evaluate, "predict": predict}[_MODE.value](config, _WORKDIR.value)


if __name__ == "__main__":
  app.run(main, flags_parser=commandline.parse, argv=commandline.with_saved_config(sys.argv))
