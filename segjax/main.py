"""The door: python -m segjax.main --config=NAME or FILE.py --workdir=runs/x [--mode=MODE] [--config.a=b ...]

MODE: train, eval, submit, dry_run, config; or, for short, segjax train, segjax eval, ... without --mode. Only flags,
process start and dispatch; the work is in functions of (config, workdir) that can be imported.
"""

import os

from absl import flags

from segjax import config as config_lib
from segjax.config import options
from segjax.run import cluster, commandline

_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ("train", "eval", "submit", "dry_run", "config", "predict"),
  "train, or score a checkpoint of the workdir, or write its predictions for a server, or say what training would need,"
  " or print the config. predict: submit's former name.",
)
_WORKDIR = commandline.define_path("workdir", None, "Folder of the run: checkpoints, curves, pictures.")
flags.register_multi_flags_validator(
  ("mode", "workdir"),
  lambda f: f["workdir"] is not None or f["mode"] in ("dry_run", "config"),
  "Name the folder of the run; only --mode=dry_run needs none, and --mode=config.",
)
_OPTIONS = flags.DEFINE_bool("options", False, "--mode=config: print the table of all options instead.")
flags.register_multi_flags_validator(
  ("mode", "options"), lambda f: f["mode"] == "config" or not f["options"], "Only --mode=config has --options."
)
_TARGET = flags.DEFINE_string(
  "target",
  None,
  "--mode=dry_run: devices to compile for, there or not: here, gpu:h100, gpu:a100, gpu:h200 (gpu:h100:8 for eight), or a"
  " slice of TPUs, as tpu:v5e:2x4, tpu:v5p:4x4x4, tpu:v6e:16x16. Tells what binds, and the costliest places of the source.",
)
_LOADER_SPEED = flags.DEFINE_float(
  "loader_speed",
  None,
  "--target: images/s that the loaders give per core, as `segjax benchmark --what=input` measures it, to tell whether the"
  " host could starve the devices.",
  lower_bound=1e-3,
)
flags.register_multi_flags_validator(
  ("target", "loader_speed"), lambda f: f["target"] or not f["loader_speed"], "Only --target has --loader_speed."
)
_JSON = commandline.define_json()
flags.register_multi_flags_validator(
  ("mode", "target", "json"),
  lambda f: f["mode"] == "dry_run" or not (f["target"] or f["json"]),
  "Only --mode=dry_run has --target and --json.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, 'host:port of process 0, where several processes run as one; "auto": JAX finds all (TPU pods).'
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes; 1: one, whatever the environment.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)


def main(argv: list[str]) -> None:
  """Dispatches; known errors end as one readable message, without a traceback."""
  del argv
  if _OPTIONS.value:
    print(options.table(), end="")
    return
  with commandline.readable_errors():
    config = commandline.config(data_dir="(not given)" if _MODE.value in ("dry_run", "config") else "")
    if _MODE.value == "config":
      print(config_lib.to_json(config_lib.finalize(flags.FLAGS.config)), end="")  # Not given is not given.
      return
    if _MODE.value == "predict":
      print("note: --mode=predict is --mode=submit now (segjax submit); segjax predict is for any images")
    processes = cluster.find_processes(os.environ, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    commandline.check_json(_JSON.value)
  if _TARGET.value not in (None, "here"):
    os.environ["JAX_PLATFORMS"] = "cpu"  # Nothing is run, and an accelerator that is here may be in use.

  # Not earlier: --help and config errors should not wait for these imports.
  from segjax.evaluate import evaluate
  from segjax.run import distributed
  from segjax.run.workdir import WorkdirError
  from segjax.tools.dry_run import dry_run
  from segjax.tools.submission import submit
  from segjax.train import NonFiniteLoss, train

  commandline.enable_float64(config)
  if processes is None:  # Else JAX has to find the others first.
    with commandline.readable_errors():
      commandline.keep_freed_memory()
  if _MODE.value != "dry_run":  # Which writes nothing, and tells how long compilation takes.
    commandline.enable_compilation_cache()
  with (
    commandline.readable_errors(),
    distributed.connected(processes, _START_TIMEOUT.value, stops_at_a_step=_MODE.value == "train"),
    # Before `connected` ends a process that fails among several.
    commandline.readable_errors(NonFiniteLoss, WorkdirError),
  ):
    if _MODE.value == "dry_run":
      dry_run(config, target=_TARGET.value, figures=_JSON.value, loader_speed=_LOADER_SPEED.value)
    else:
      {"train": train, "eval": evaluate, "submit": submit, "predict": submit}[_MODE.value](config, _WORKDIR.value)


if __name__ == "__main__":
  commandline.run(main)
