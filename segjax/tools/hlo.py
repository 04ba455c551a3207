"""What XLA made of a program: the operations in its compiled text."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
  "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
  "reduce-scatter",
)  # fmt: skip
# Operations that stand for those of the computations they call.
CONTROL = frozenset({"while", "conditional", "call", "async-start"})
_COMPUTATION = re.compile(r"^(ENTRY )?(%?[\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%[\w.\-]+")
_CALLED = re.compile(r"=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")  # calls=%a, body=%b, branch_computations={%c, %d}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_ROW = re.compile(r"^(\d+) (.*)$")  # Of the tables before the computations, which tell where operations are from.


class Array(NamedTuple):
  """An array of a shape, e.g. bf16[8,3]{1,0:T(8,128)(2,1)S(1)}: two of its dimensions in tiles, in memory space 1."""

  dtype: str
  dims: tuple[int, ...]
  layout: str

  @property
  def bits(self) -> int:
    """Of a number."""
    return 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or "0")[0])

  @property
  def size(self) -> int:
    """Bytes of its numbers."""
    return -(-self.bits * math.prod(self.dims) // 8)

  @property
  def footprint(self) -> int:
    """Bytes that it takes: on TPU, with what fills the last tiles up."""
    tile = re.search(r"T\(([\d,]+)\)", self.layout)
    if not tile:
      return self.size
    dims = list(self.dims)
    minor_to_major = [int(n) for n in self.layout.split(":")[0].split(",") if n]  # None of a number alone.
    for dim, length in zip(minor_to_major, map(int, reversed(tile[1].split(",")))):
      dims[dim] = -(-dims[dim] // length) * length
    return self._replace(dims=tuple(dims)).size

  @property
  def space(self) -> int:
    """0: the device's main memory. Others mean different things on different platforms."""
    found = re.search(r"S\((\d+)\)", self.layout)
    return int(found[1]) if found else 0


def arrays(shape: str) -> list[Array]:
  """The arrays of an HLO shape or tuple of shapes, e.g. "(f32[2,3]{1,0}, bf16[])". Tokens count as empty."""
  return [Array(t, tuple(int(n) for n in d.split(",") if n), layout or "") for t, d, layout in _ARRAY.findall(shape)]


def shape_bytes(shape: str) -> int:
  """Bytes of an HLO shape or tuple of shapes, e.g. "(f32[2,3]{1,0}, bf16[])": 26. Tokens have none."""
  return sum(array.size for array in arrays(shape))


@dataclasses.dataclass(eq=False)
class Operation:
  """A line of a computation.

  Attributes:
    kind: e.g. "fusion".
    operands: names of operations of the same computation.
    argument: the text between the brackets.
    attributes: the text after them.
  """

  name: str
  shape: str
  kind: str
  argument: str
  attributes: str
  root: bool

  @functools.cached_property
  def arrays(self) -> list[Array]:
    """Of its result."""
    return arrays(self.shape)

  @functools.cached_property
  def operands(self) -> list[str]:
    return _NAME.findall(self.argument)

  def attribute(self, name: str) -> str:
    """What follows `name=`, up to a space or comma outside of brackets; empty where there is none."""
    found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
    return found[1].strip("{}") if found else ""

  @property
  def op_name(self) -> str:
    """The path of JAX's primitives that it is of, e.g. "jit(step)/transpose(jvp(Conv))/add"."""
    found = re.search(r'op_name="([^"]*)"', self.attributes)
    return found[1] if found else ""


@dataclasses.dataclass
class Module:
  """A compiled program.

  Attributes:
    computations: {name: {name of operation: operation}}.
    entry: name of the computation that is run.
    tables: {"FileNames": {id: text}, ...}, of which `stack_frame_id` of an operation's metadata is the key.
  """

  computations: dict[str, dict[str, Operation]]
  entry: str
  tables: dict[str, dict[int, str]]

  def called(self, operation: Operation) -> list[str]:
    """Names of the computations that an operation names."""
    names = [name for found in _CALLED.findall(operation.attributes) for name in re.split(", ?", found)]
    return [name for name in names if name in self.computations]

  def run(self, entering=CONTROL) -> Iterator[tuple[dict[str, Operation], Operation, int]]:
    """(computation, operation, times) of all that one run of the program does.

    What stands in a loop is done once for each turn, or once where XLA does not know how many there are. Of a conditional
    all branches count.

    Args:
      entering: kinds of operations whose computations are gone through.
    """

    def visit(name: str, times: int):
      computation = self.computations[name]
      for operation in computation.values():
        yield computation, operation, times
        if operation.kind in entering:
          trips = _TRIPS.search(operation.attributes)
          for other in self.called(operation):
            yield from visit(other, times * int(trips[1]) if trips else times)

    yield from visit(self.entry, 1)

  def place(self, operation: Operation) -> str:
    """Where in the source an operation is from, as "kernels/depthwise.py:97 _taps": the innermost of segjax's own lines.

    Of those of other packages where it is from none of ours; empty where XLA does not tell.
    """
    frames = list(self._frames(operation))
    own = [frame for frame in frames if "/segjax/" in frame[0]]
    if not frames:
      return ""
    file, function, line = (own or frames)[0]
    return f"{file.rpartition('/segjax/' if own else '/')[2]}:{line} {function}".strip()

  def _frames(self, operation: Operation) -> Iterator[tuple[str, str, str]]:
    """(file, function, line) from the innermost call outwards."""
    frame = int(operation.attribute("stack_frame_id") or 0)
    while frame:
      of_frame = _numbers(self.tables["StackFrames"][frame])
      location = _numbers(self.tables["FileLocations"][of_frame["file_location_id"]])
      yield (
        self.tables["FileNames"][location["file_name_id"]].strip('"'),
        self.tables["FunctionNames"][location["function_name_id"]].strip('"'),
        str(location["line"]),
      )
      frame = of_frame["parent_frame_id"] - 1 if "parent_frame_id" in of_frame else 0
    if file := re.search(r'source_file="([^"]*)"', operation.attributes):  # Of other versions of XLA.
      yield file[1], "", operation.attribute("source_line")


def _numbers(row: str) -> dict[str, int]:
  """A row of a table, e.g. {file_location_id=1 parent_frame_id=2}, as a dict."""
  return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", row)}


def parse(text: str) -> Module:
  """The operations of a compiled (partitioned) module: of `jitted.lower(...).compile().as_text()`."""
  computations, tables, entry, section, operations = {}, collections.defaultdict(dict), None, None, None
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      operations = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif operations is None:
      if row := _ROW.match(line):
        tables[section][int(row[1])] = row[2]
      else:
        section = line.strip()
    elif found := _OPERATION.match(line):
      root, name, shape, kind, rest = found.groups()
      end = _closing(rest)
      operations[name] = Operation(name, shape, kind, rest[:end], rest[end + 1 :], bool(root))
  return Module(computations, entry, tables)


def _closing(text: str) -> int:
  """Index of the bracket that closes one before `text`."""
  depth = 1
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if not depth:
      return found.start()
  return len(text)


def collectives(text: str) -> dict[str, list[int]]:
  """The collectives that one run of a program does, by kind, in the order of the text.

  Args:
    text: as of `parse`.

  Returns:
    {"all-reduce": [bytes, ...], ...} with every kind in `COLLECTIVES`: the size of each one's result on one device;
    several arrays that XLA has combined are one. Loops and conditionals count as `Module.run` says.
  """
  found = {kind: [] for kind in COLLECTIVES}
  for _, operation, times in parse(text).run(CONTROL | {"fusion"}):
    # Of an asynchronous pair the second half counts: the result of the first half holds the operands too.
    kind = operation.kind.removesuffix("-done")
    if kind in found:
      found[kind] += [shape_bytes(operation.shape)] * times
  return found
