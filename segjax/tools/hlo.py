"""What XLA made of a program: the collectives in its compiled text."""

import math
import re

COLLECTIVES = (
  "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
  "reduce-scatter",
)  # fmt: skip
# Of an asynchronous pair the second half counts: the result of the first half holds the operands too.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-done)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")  # calls=%a, body=%b, branch_computations={%c, %d}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collectives(text: str) -> dict[str, list[int]]:
  """The collectives that one run of a program does, by kind, in the order of the text.

  Args:
    text: of the compiled (partitioned) module: `jitted.lower(...).compile().as_text()`.

  Returns:
    {"all-reduce": [bytes, ...], ...} with every kind in `COLLECTIVES`: the size of each one's result on one device;
    several arrays that XLA has combined are one. What stands in a loop counts once for each turn, or once where XLA does
    not know how many there are. Of a conditional all branches count.
  """
  computations, entry = {}, None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      lines = computations[head[2]] = []
      entry = head[2] if head[1] else entry
    elif line.startswith("  "):
      lines.append(line)
  found = {kind: [] for kind in COLLECTIVES}

  def visit(name: str, times: int):
    for line in computations[name]:
      if match := _COLLECTIVE.search(line):
        found[match[2]] += [shape_bytes(match[1])] * times
      trips = _TRIPS.search(line)
      for names in _CALLED.findall(line):
        for other in re.split(", ?", names):
          if other in computations:
            visit(other, times * int(trips[1]) if trips else times)

  visit(entry, 1)
  return found


def shape_bytes(shape: str) -> int:
  """Bytes of an HLO shape or tuple of shapes, e.g. "(f32[2,3]{1,0}, bf16[])": 26. Tokens have none."""
  total = 0
  for dtype, dims in re.findall(r"\b([a-z]+\w*)\[([\d,]*)\]", shape):
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or "0")[0])
    total += -(-bits * math.prod(int(n) for n in dims.split(",") if n) // 8)
  return total
