"""Scoring a run, or weights of other frameworks: whole images against their own labels."""

import pathlib

import jax

from segjax import input_pipeline
from segjax.experiment import Experiment
from segjax.run import image_statistics, outputs, record, report, warm_start
from segjax.run.evaluation import Evaluation


def evaluate(config, workdir) -> dict[str, float]:
  """--mode=eval: scores the best or last checkpoint of `workdir` on `config.data.eval_split`.

  Where `workdir` holds no run, the weights that `config.init` names are scored as they are. Prints the table, appends
  the scores to `workdir`/eval_SPLIT/metrics.jsonl, and writes counts and overlays beside it, and `workdir`/report.html; says
  so where these cannot be written.

  Returns:
    The scores, e.g. {"val/mean_iou": ...}.

  Raises:
    ConfigError: no run or no checkpoint in `workdir`, or one of another model.
    DataError: the split cannot be used.
  """
  workdir = pathlib.Path(workdir)
  loaded = warm_start.load_unless_run(config, workdir)
  config = image_statistics.resolved(config, workdir, measure=False)
  experiment = Experiment(config)
  split = config.data.eval_split
  results = outputs.output_path(workdir, f"eval_{split}")
  source = experiment.eval_source
  report.say(report.data_lines(config.data, {split: source}))
  input_pipeline.cache.check_room(config.data.cache, (source,))
  evaluator = experiment.evaluator
  variables, step, origin = experiment.trained_variables(workdir, loaded)

  evaluation = evaluator(variables)
  written = _write(results, step, evaluation, workdir)
  if jax.process_index() == 0:
    window = f", windows {tuple(config.eval.window)}" if any(config.eval.window) else ""
    print(
      f"{split}: {len(source)} images, {origin}, scales {tuple(config.eval.scales)}, flip {config.eval.flip}{window}\n"
      f"{evaluation.table}\n{written}",
      flush=True,
    )
  return evaluation.scalars


def _write(folder: pathlib.Path, step: int, evaluation: Evaluation, workdir: pathlib.Path) -> str:
  """Writes scores, pictures and the report of `workdir`, and tells where they are, or why they are not: the table must not be lost with them."""
  try:
    writer = report.Writer(folder)
    record.write(writer, step, evaluation)
  except OSError as error:
    return f"NOT WRITTEN, scores and pictures in {folder}: {error}. The table above is all there is."
  page = writer.page(workdir)
  return f"scores and pictures: {folder}" + (f"\nreport: {page}" if page else "")


if __name__ == "__main__":
  from segjax.run import commandline

  commandline.refuse("main --mode=eval --workdir=RUN")
