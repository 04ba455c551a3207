"""Makes the page of a run again, or of several beside each other: python -m segjax.report RUN [RUN...] [--out=FILE]

Of one run, RUN/report.html, which training and evaluation write too. Of several, report.html in the current folder: their
curves over each other, their scores, and the fields in which their configs differ.
"""

import pathlib

from absl import flags

from segjax import config as config_lib
from segjax.config import ConfigError
from segjax.run import commandline


def main(argv: list[str]) -> None:
  """The command line."""
  with commandline.readable_errors():
    if len(argv) < 2:
      raise ConfigError("Name the workdir of a run, or several.")
    from segjax.run import page  # Not earlier: --help need not wait for it.

    runs = [pathlib.Path(config_lib.expand_home(run)) for run in argv[1:]]
    out = pathlib.Path(flags.FLAGS.out) if flags.FLAGS.out else None
    try:
      path = page.write(runs[0], out) if len(runs) == 1 else page.compare(runs, out or pathlib.Path(page.FILE))
    except OSError as error:
      raise ConfigError(f"The report cannot be written ({error}). Give another file: --out=FILE.") from error
    print(f"report: {path}")


if __name__ == "__main__":
  commandline.define_path("out", None, "File of the page.")
  flags.FLAGS.set_gnu_getopt(True)  # Runs may stand between flags.
  commandline.run(main, positional=True, takes_config=False)
