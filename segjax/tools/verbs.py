"""The console command `segjax VERB`, from any folder: each verb is a `python -m` command under a shorter name."""

import re
import runpy
import sys

from segjax.config import suggest
from segjax.run import commandline

# Verb: its module, the arguments that make the verb of it, and what it does.
VERBS = {
  "train": ("segjax.main", ("--mode=train",), "train a config, or go on with the run in --workdir"),
  "eval": ("segjax.main", ("--mode=eval",), "score a checkpoint of a run, or weights, on a split"),
  "report": ("segjax.report", (), "make the page of a run again, or compare several"),
  "predict": ("segjax.predict", (), "predict any images with a run or weights"),
  "export": ("segjax.export", (), "write a trained network as files that run without segjax"),
  "submit": ("segjax.main", ("--mode=submit",), "predict a split and pack it as its benchmark's server takes it"),
  "check": ("segjax.check_data", (), "read a whole data set and name every problem"),
  "browse": ("segjax.browse", (), "show the training data as the network gets them, on one HTML page"),
  "prepare": ("segjax.prepare", (), "unpack VOC, Cityscapes or the nuclei; masks from the JSON of COCO or LabelMe"),
  "dry-run": ("segjax.main", ("--mode=dry_run",), "say what training would need: memory, work, communication"),
  "benchmark": ("segjax.benchmark", (), "measure the speed of the steps and of the input"),
  "config": ("segjax.main", ("--mode=config",), "print the resolved config as JSON; --options: all options"),
}


def main() -> None:
  """The command line. Each command then gets the arguments that it has after `python -m`."""
  verb, *arguments = sys.argv[1:] or ["--help"]
  if verb in ("-h", "--help", "-help", "help"):
    print("segjax VERB [--config=NAME or FILE.py] [--config.field=value ...]; segjax VERB --help says more.\n")
    print("\n".join(f"  {name:10} {text}" for name, (_, _, text) in VERBS.items()))
    return
  if verb not in VERBS:
    commandline.stop(f"no verb {verb!r}.{suggest(verb, VERBS)} The verbs: {', '.join(VERBS)}.")
  module, mode, _ = VERBS[verb]
  if mode and any(re.match("--?mode(=|$)", word) for word in arguments):
    commandline.stop(f"segjax {verb} takes no --mode. Leave it out, or name another verb: {', '.join(VERBS)}.")
  sys.argv[1:] = [*mode, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)  # So that --help is of this module.


if __name__ == "__main__":
  main()
