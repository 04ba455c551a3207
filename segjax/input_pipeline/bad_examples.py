"""Training examples that become unreadable during a run: how many it tolerates, and how it stays repeatable."""

import json
import pathlib
import threading

from segjax.input_pipeline import images
from segjax.input_pipeline.images import DataError


class BadExamples:
  """The examples that a training run could not read. Each is all void in the step that needed it.

  Which those are is written down before the step is taken, a JSON line each in `workdir`/bad_examples_PROCESS.jsonl.
  A resumed run has them void in these steps again, even if the files can be read by then, and so ends as if it had never
  stopped. In any other step the file is read again: once restored, it counts.

  Attributes:
    most: how many examples may be bad; one more stops the run.
    names: of those that were bad before this start.

  Args:
    workdir: of the run; all of its processes see the same one.
    most: see above.
    process: index of this process, which writes a file of its own.

  Raises:
    DataError: more are written down already, or a file that is damaged.
  """

  def __init__(self, workdir, most: int, process: int = 0):
    self._folder, self.most, self._process = pathlib.Path(workdir), most, process
    self._lock = threading.Lock()
    known = self._read()
    self._steps_and_rows = {(line["step"], line["row"]) for line in known}
    self.names = names = sorted({line["name"] for line in known})
    if len(names) > most:
      raise DataError(
        f"{self._folder}/bad_examples_*.jsonl: this run met {len(names)} bad examples ({images.listed(names)}), more than"
        f" data.max_bad_examples = {most}. Raise it to {len(names)} or more to go on."
      )

  def __contains__(self, step_and_row: tuple[int, int]) -> bool:
    """Whether the example in (step, row of the global batch), both from 0, was bad."""
    return step_and_row in self._steps_and_rows

  def add(self, step: int, row: int, name: str, error: DataError) -> None:
    """Records that the example in row `row` of a step cannot be read.

    Raises:
      DataError: it is one too many; names it, and says what is wrong with it.
    """
    with self._lock:
      names = sorted({line["name"] for line in self._read()} | {name})
      if len(names) > self.most:
        others = f" (the others: {images.listed(n for n in names if n != name)})" if len(names) > 1 else ""
        raise DataError(
          f"Example {name}, needed in step {step + 1}: {error}\nIt is bad example {len(names)}{others};"
          f" data.max_bad_examples = {self.most}. Once the file is restored, or with a larger number, the same command"
          " goes on."
        ) from error
      with (self._folder / f"bad_examples_{self._process}.jsonl").open("a") as file:
        file.write(json.dumps(dict(step=step, row=row, name=name, error=str(error))) + "\n")
      self._steps_and_rows.add((step, row))
    print(f"BAD EXAMPLE {name}, void in step {step + 1} ({len(names)} of at most {self.most}): {error}", flush=True)

  def count(self, steps: int) -> int:
    """How many different examples were bad in the first `steps` steps, on all processes."""
    with self._lock:
      return len({line["name"] for line in self._read() if line["step"] < steps})

  def _read(self) -> list[dict]:
    lines = []
    for path in sorted(self._folder.glob("bad_examples_*.jsonl")):
      for line in path.read_text(errors="replace").splitlines(keepends=True):
        if line.endswith("\n"):  # Else cut short when its run was killed, before its step was taken.
          lines.append(_parse(path, line))
    return lines


def _parse(path: pathlib.Path, line: str) -> dict:
  try:
    parsed = json.loads(line)
    return dict(step=int(parsed["step"]), row=int(parsed["row"]), name=str(parsed["name"]))
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path}: not a list of bad examples ({line.strip()[:80]!r}). Remove that line.") from error
