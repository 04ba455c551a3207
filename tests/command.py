"""The commands in this process: what `python -m` would print and return, without a new process's imports."""

import contextlib
import io
import runpy
import sys
import warnings
from unittest import mock

from absl import app, flags

from segjax.run import commandline


@contextlib.contextmanager
def _flags_of_a_new_process():
  """Absl's flags: without those that modules of segjax defined, which come back afterwards, as do all values."""
  app.define_help_flags()
  registry = vars(flags.FLAGS)  # Of all modules of the process.
  named = registry["__flags"]

  def own():
    """Those of segjax, or of the program itself, whose module absl calls by its file."""
    modules = {name: flags.FLAGS.find_module_defining_flag(name) or "" for name in named}
    return {name for name, module in modules.items() if "segjax" in module or name.partition(".")[0] == "config"}

  hidden = {name: named.pop(name) for name in own()}
  switches = {name: value for name, value in registry.items() if isinstance(value, bool)}
  values = {name: (flag.value, vars(flag).copy()) for name, flag in named.items()}
  try:
    yield
  finally:
    for name in own():
      del named[name]
    named.update(hidden)
    registry.update(switches)
    for name, (value, whole) in values.items():
      if named[name].value != value:
        named[name].value = value  # Which has effects: the verbosity is the logger's.
      vars(named[name]).update(whole)


def run(module: str, *arguments, cwd=None) -> tuple[int, str, str]:
  """(exit code, stdout, stderr) of `python -m MODULE ARGUMENTS` in the folder `cwd`; an uncaught exception is raised.

  But for what a command does to its whole process: absl's logging, and malloc's settings.
  """
  out, err = io.StringIO(), io.StringIO()
  start = lambda main, flags_parser, argv: sys.exit(main(flags_parser(argv)))  # noqa: E731
  with (
    contextlib.chdir(cwd or "."),
    mock.patch.object(sys, "argv", [module, *map(str, arguments)]),
    mock.patch.object(app, "run", start),
    mock.patch.object(commandline, "keep_freed_memory"),
    _flags_of_a_new_process(),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    warnings.catch_warnings(),
  ):
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    code = 0
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
      code = end.code or 0
  return code, out.getvalue(), err.getvalue()
