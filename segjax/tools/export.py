"""A trained network as files that run without segjax: segjax export RUN --out=DIR [--format=stablehlo,onnx] [--push=hf://...]

RUN is a workdir; instead, --config=FILE --config.init.path=WEIGHTS --config.init.scheme=NAME export weights of others. The
network predicts as the run's evaluation does, whose options --config.eval.* override; images come as they are in their
files, and class ids and probabilities go out. Formats:

  stablehlo    jax.export: one file for CPU, CUDA and TPU; images of any size up to the evaluation's canvas, in any batch
  safetensors  the weights alone, by segjax' names, for --config.init.path=model.safetensors --config.init.scheme=segjax
  onnx         onnxruntime and its like; images laid on the canvas, in any batch
  litert       LiteRT (TFLite); one image laid on the canvas

Each file is loaded by its own runtime and compared with segjax' evaluation on images of the evaluation's split before it
is kept. DIR gets the files, classes.txt and model_card.md.
"""

import dataclasses
import pathlib
import shutil
import sys
import tempfile

import numpy as np
from absl import flags

from segjax.config import ConfigError, suggest
from segjax.run import commandline, image_statistics, prediction_info

BOUNDS = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.1}  # Of probabilities, by the network's dtype.
SAMPLES = 4  # Images that are compared.


def export(config, workdir: pathlib.Path | None, out: pathlib.Path, formats: list[str], license: str) -> None:
  """Writes the folder `out`, whole or not at all; see the module.

  Args:
    workdir: of a run; None for the weights of `config.init`.
    formats: keys of `FORMATS`.
    license: of the weights; "": not stated.

  Raises:
    ConfigError: no run, checkpoint or weights; `out` is there already, or cannot be written; a format that is unknown, lacks
      its library or cannot express the network; or a file that computes something else.
  """
  from segjax.tools.exports.formats import FORMATS

  for name in formats:
    if name not in FORMATS:
      raise ConfigError(f"--format={name}: no such format.{suggest(name, FORMATS)} Known: {', '.join(FORMATS)}.")
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise ConfigError(f"--out={out} is there already. Give another, or remove it.")
  from segjax.run import record
  from segjax.tools.exports.card import card

  program, step = load(config, workdir)
  sample_images, what = program.samples(SAMPLES)
  expected = [program.evaluated(image) for image in sample_images]
  try:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
      folder, checks = pathlib.Path(temporary) / out.name, {}
      folder.mkdir()
      for name in formats:
        checks[name] = f"{_checked(FORMATS[name], name, folder, program, sample_images, expected)} on {what}."
        size = (folder / FORMATS[name].file).stat().st_size
        print(f"{name}: {FORMATS[name].file}, {size:,} bytes. {checks[name]}", flush=True)
      scores = record.newest(workdir) if workdir else None
      scores = scores if scores and scores["step"] == step else None
      page = card(program, (workdir or out).resolve().name, checks, scores, record.origin(), license)
      (folder / "model_card.md").write_text(page)
      (folder / "classes.txt").write_text("".join(f"{name}\n" for name in program.info.classes))
      if out.exists():
        out.rmdir()
      shutil.move(folder, out)
  except OSError as error:
    raise ConfigError(f"--out={out} cannot be written ({error}). Free the space, or give another.") from error
  print(f"{program.origin}\nexported: {out}/", flush=True)


def load(config, workdir: pathlib.Path | None):
  """The program of a run or of the weights of `config.init`, and its step.

  Raises:
    ConfigError: see `export`.
  """
  from segjax import sharding
  from segjax.experiment import Experiment
  from segjax.run import warm_start
  from segjax.tools.exports.program import Program

  config = image_statistics.resolved(config, workdir, measure=False)
  loaded = warm_start.load_unless_run(config, workdir)
  info = prediction_info.of_run(config, workdir)
  if info.canvas_size is None:
    raise ConfigError(
      "No evaluation's canvas is known. Give the largest size of images: --config.data.canvas_size=H,W."
    )
  experiment = Experiment(config, mesh=sharding.make_mesh(1, 1), num_classes=len(info.classes), labels=False)
  variables, step, origin = experiment.trained_variables(workdir, loaded)
  return Program(experiment, variables, dataclasses.replace(info, canvas_size=tuple(info.canvas_size)), origin), step


def _checked(format, name: str, folder: pathlib.Path, program, sample_images, expected) -> str:
  """Writes a file and compares it; the line to report. ConfigError where it cannot be made, or computes something else."""
  path = folder / format.file
  try:
    format.write(program, path)
    results = [format.load(path, program)(image) for image in sample_images]
  except (ConfigError, OSError):
    raise
  except Exception as error:  # Each converter has its own.
    lines = str(error).splitlines() or [""]
    raise ConfigError(
      f"--format={name} cannot express this network: {type(error).__name__}: {lines[0][:300]}. Leave the format out."
    ) from error
  other = np.mean(np.concatenate([(a != b).reshape(-1) for (a, _), (b, _) in zip(results, expected)]))
  most = max(float(np.abs(a - b).max()) for (_, a), (_, b) in zip(results, expected))
  bound = BOUNDS[program.experiment.config.dtype]
  if not most <= bound:  # Nor NaN.
    raise ConfigError(
      f"--format={name}: probabilities differ from segjax' own by up to {most:.2g}, more than {bound:g}, so it is not kept."
      " Choose another format, and report this network and these versions."
    )
  same = (
    "Probabilities as of segjax' evaluation bit for bit"
    if not most
    else f"Probabilities within {most:.1e} of segjax' own"
  )
  return f"{same}, {100 * other:.3g} % of the pixels of another class,"


def push(out: pathlib.Path, address: str) -> None:
  """Uploads a folder as the Hub's model `hf://OWNER/NAME`, whose README becomes the model card.

  Raises:
    ConfigError: no such address, no huggingface_hub, or the Hub refuses.
  """
  owner, name = _repository(address)
  huggingface_hub = _hub()
  try:
    api = huggingface_hub.HfApi()
    api.create_repo(f"{owner}/{name}", exist_ok=True)
    api.upload_folder(repo_id=f"{owner}/{name}", folder_path=out, commit_message="segjax export")
    api.upload_file(repo_id=f"{owner}/{name}", path_or_fileobj=out / "model_card.md", path_in_repo="README.md")
  except Exception as error:  # The library's, and those of its transport.
    raise ConfigError(
      f"--push={address}: {type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}. The export stays in {out}; log in"
      " (hf auth login), check the name, and upload it: hf upload."
    ) from error
  print(f"pushed: {address}", flush=True)


def _repository(address: str) -> tuple[str, str]:
  parts = address.removeprefix("hf://").split("/")
  if not address.startswith("hf://") or len(parts) != 2 or not all(parts):
    raise ConfigError(f"--push={address}: write hf://OWNER/NAME.")
  return parts[0], parts[1]


def _hub():
  from segjax.tools.exports.formats import library

  return library("huggingface_hub", "'segjax[hub]'")


def _define_flags() -> None:
  commandline.define_path("workdir", None, "The run; its name alone, as the first argument, does too.")
  commandline.define_path("out", None, "Folder of the results.")
  flags.DEFINE_list("format", ["stablehlo", "safetensors"], "stablehlo, safetensors, onnx, litert, comma-separated.")
  flags.DEFINE_string("push", "", "hf://OWNER/NAME: uploads the folder to the Hugging Face Hub.")
  flags.DEFINE_string("license", "", "Of the weights, for the model card: an identifier, as apache-2.0.")


def main(argv: list[str]) -> None:
  """The command line."""
  del argv
  args = flags.FLAGS
  with commandline.readable_errors():
    if args.out is None:
      raise ConfigError("Name the folder of the results: --out=DIR.")
    if args.push:  # Before anything slow.
      _repository(args.push)
      _hub()
    config = commandline.config(data_dir=".")
    if args.workdir is None and not config.init.path:
      raise ConfigError("Name a run, segjax export RUN --out=DIR, or weights by --config.init.path.")
    workdir = None if args.workdir is None else pathlib.Path(args.workdir)
    commandline.enable_float64(config)
    commandline.enable_compilation_cache()
    export(config, workdir, pathlib.Path(args.out), args.format, args.license)
    if args.push:
      push(pathlib.Path(args.out), args.push)


if __name__ == "__main__":
  if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    sys.argv[1] = f"--workdir={sys.argv[1]}"
  _define_flags()
  commandline.run(main)
