"""What the operations of a compiled program move through device memory and multiply: exact counts, and repeatable.

An operation reads each of its operands from memory once and writes its result, which is so of kernels that fit their caches.
Of a fusion, what stays within it counts as nothing.
"""

import collections
import math
import re
from typing import NamedTuple

from segjax.tools import hlo
from segjax.tools.hlo import Module, Operation

# They move nothing: the first name or hold what is there, or are done by what they call.
_FREE = hlo.CONTROL | {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "async-update",
  "async-done",
}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")
_SLICES = ("slice", "dynamic-slice", "gather")
_IN_PLACE = "dynamic-update-slice"


class Cost(NamedTuple):
  """What an operation costs one device in a run, all its turns together.

  Attributes:
    kind: e.g. "fusion".
    times: that it is run.
    read, written: bytes of device memory.
    flops: two for each multiply-add of a convolution or matrix product that meets neither padding nor holes.
    numbers: what these are of, "bf16", "f32", or "f32 highest" where full precision is asked for; empty without flops.
    cycles: XLA's estimate, on TPU; else 0.
    place: see `hlo.Module.place`; " (backward)" is added to what is of a backward pass.
  """

  kind: str
  times: int
  read: int
  written: int
  flops: int
  numbers: str
  cycles: int
  place: str

  @property
  def moved(self) -> int:
    """Bytes read and written."""
    return self.read + self.written


def costs(text: str, on_chip: bool) -> list[Cost]:
  """The costs of a compiled program's operations.

  Args:
    text: as of `hlo.parse`.
    on_chip: whether memory spaces other than 0 are memories of the chip itself, as on TPU, whose traffic does not count.
      On GPU they are parts of device memory.
  """
  counter, found = _Counter(hlo.parse(text), on_chip), []
  for computation, operation, times in counter.module.run():
    read, written = counter.traffic(computation, operation)
    products = list(counter.products(computation, operation))
    _, numbers, largest = max(products, key=lambda product: product[0], default=(0, "", operation))
    cycles = re.search(r'"estimated_cycles":"(\d+)"', operation.attributes)
    cost = Cost(
      operation.kind,
      times,
      times * read,
      times * written,
      times * sum(flops for flops, _, _ in products),
      numbers,
      times * int(cycles[1]) if cycles else 0,
      counter.place(largest, operation, *counter.within(operation)),
    )
    if cost.moved or cost.flops or cost.cycles or cost.kind == "fusion":
      found.append(cost)
  return found


def by_place(found: list[Cost], weight) -> list[tuple[str, float, list[Cost]]]:
  """(place, weight, costs), the heaviest first.

  Args:
    weight: of a cost, a number.
  """
  places = collections.defaultdict(list)
  for cost in found:
    places[cost.place].append(cost)
  rows = [(place, sum(map(weight, group)), group) for place, group in places.items()]
  return sorted(rows, key=lambda row: -row[1])


class _Counter:
  def __init__(self, module: Module, on_chip: bool):
    self.module, self._on_chip = module, on_chip

  def within(self, operation: Operation) -> list[Operation]:
    """What a fusion does, the last first."""
    names = self.module.called(operation) if operation.kind == "fusion" else []
    return [inner for name in names for inner in reversed(self.module.computations[name].values())]

  def place(self, operation: Operation, *others: Operation) -> str:
    """Of the first that XLA knows the place of."""
    for known in (operation, *others):
      if place := self.module.place(known):
        return place + " (backward)" * ("transpose(" in known.op_name)
    return f"{operation.kind}, XLA's own"

  def _in_memory(self, arrays) -> int:
    return sum(array.footprint for array in arrays if not (self._on_chip and array.space))

  def traffic(self, computation: dict[str, Operation], operation: Operation) -> tuple[int, int]:
    """Bytes that an operation reads and writes. The first half of an asynchronous pair reads, the second writes."""
    kind, _, half = (
      operation.kind.rpartition("-") if operation.kind.endswith(("-start", "-done")) else (operation.kind, "", "")
    )
    target = operation.attribute("custom_call_target").strip('"')
    if operation.kind in _FREE or target in _FREE_CALLS:
      return 0, 0
    source = computation[operation.operands[0]] if half == "done" else operation
    operands = [computation[name] for name in source.operands if name in computation]
    sizes = [self._in_memory(operand.arrays) for operand in operands]
    if kind == "fusion":
      return self._of_fusion(operation, sizes)
    read, written = sum(sizes), self._in_memory(_outputs(operation))
    if kind in _SLICES:
      part = operation.arrays[-2] if half == "start" else operation.arrays[0]  # Of ((operands), result, context).
      read = min(sizes[0], part.footprint) + sum(sizes[1:])
    elif kind == _IN_PLACE:
      read, written = sizes[1], min(written, operands[1].arrays[0].footprint)
    return read * (half != "done"), written * (half != "start")

  def _of_fusion(self, operation: Operation, sizes: list[int]) -> tuple[int, int]:
    body = self.module.computations[self.module.called(operation)[0]]
    users = collections.defaultdict(list)
    for inner in body.values():
      for name in inner.operands:
        users[name].append(inner)
    roots = [_behind_bitcasts(body, root) for root in _roots(body)]
    roots = roots * len(operation.arrays) if len(roots) == 1 else roots  # One operation may have several results.
    in_place = [root for root in roots if root.kind == _IN_PLACE]
    read, parameters = 0, {int(p.argument): p.name for p in body.values() if p.kind == "parameter"}
    for number, size in enumerate(sizes):
      part = _part_read(body, users, parameters[number], in_place)
      read += size if part is None else min(size, part)
    written = 0
    for root, array in zip(roots, operation.arrays):
      size = self._in_memory([array])
      written += min(size, body[root.operands[1]].arrays[0].footprint) if root.kind == _IN_PLACE else size
    return read, written

  def products(self, computation: dict[str, Operation], operation: Operation):
    """(flops, numbers, operation) of the convolutions and matrix products of an operation, those of a fusion included."""
    for name in self.module.called(operation) if operation.kind == "fusion" else ():
      body = self.module.computations[name]
      for inner in body.values():
        yield from self.products(body, inner)
    target = operation.attribute("custom_call_target").strip('"') if operation.kind == "custom-call" else ""
    if operation.kind in ("convolution", "dot") or target.startswith(("__cudnn$conv", "__cublas$")):
      first, second = (computation[name].arrays[0] for name in operation.operands[:2])
      flops = (
        _matmul(operation, first)
        if "cublas" in target or operation.kind == "dot"
        else _convolution(operation, *_roles(target, first, second, operation.arrays[0]))
      )
      full = first.dtype == "f32" and "highest" in operation.attributes.lower()
      yield flops, first.dtype + " highest" * full, operation


def _outputs(operation: Operation) -> list[hlo.Array]:
  """The arrays of its result, without the scratch memory of NVIDIA's libraries, which they may use or not."""
  if operation.kind != "custom-call" or "__cu" not in operation.attributes:
    return operation.arrays
  return [array for array in operation.arrays if not (array.dtype in ("s8", "u8") and len(array.dims) == 1)]


def _roots(body: dict[str, Operation]) -> list[Operation]:
  (root,) = (operation for operation in body.values() if operation.root)
  return [body[name] for name in root.operands] if root.kind == "tuple" else [root]


def _behind_bitcasts(body: dict[str, Operation], operation: Operation) -> Operation:
  while operation.kind == "bitcast":
    operation = body[operation.operands[0]]
  return operation


def _part_read(body, users, name: str, in_place: list[Operation]) -> int | None:
  """Bytes that a fusion reads of one of its parameters where it uses slices of it only; None: all."""
  total = 0
  for user in users[name]:
    if user.kind == "bitcast":
      part = _part_read(body, users, user.name, in_place)
    elif user.operands[0] != name:
      return None
    elif user.kind in _SLICES:
      part = user.arrays[0].footprint
    else:
      part = 0 if user in in_place else None
    if part is None:
      return None
    total += part
  return total


def _matmul(operation: Operation, first: hlo.Array) -> int:
  contracted = operation.attribute("lhs_contracting_dims")
  if operation.kind != "dot":
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', operation.attributes)[1]
  return 2 * math.prod(operation.arrays[0].dims) * math.prod(first.dims[int(n)] for n in re.findall(r"\d+", contracted))


def _roles(
  target: str, first: hlo.Array, second: hlo.Array, result: hlo.Array
) -> tuple[hlo.Array, hlo.Array, hlo.Array]:
  """(image, kernel, result) of the convolution whose value or gradient cuDNN computes."""
  if "BackwardInput" in target:
    return result, second, first
  if "BackwardFilter" in target:
    return first, result, second
  return first, second, result


def _convolution(operation: Operation, image: hlo.Array, kernel: hlo.Array, result: hlo.Array) -> int:
  """Of the taps that meet a pixel of the image, not its padding or the holes that dilation makes."""
  window = dict(pair.split("=") for pair in operation.attribute("window").split())
  labels = re.match(r"(\w+)_(\w+)->(\w+)", operation.attribute("dim_labels")).groups()
  spatial = sorted(label for label in labels[0] if label.isdigit())
  flops = 2 * kernel.dims[labels[1].index("i")]
  flops *= math.prod(n for n, label in zip(result.dims, labels[2]) if not label.isdigit())
  for n, label in enumerate(spatial):
    pixels, taps, results = (array.dims[names.index(label)] for array, names in zip((image, kernel, result), labels))
    stride, spread, rate = (
      int(window[name].split("x")[n]) if name in window else 1 for name in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(window["pad"].split("x")[n].split("_")[0]) if "pad" in window else 0
    seen = (p * stride + tap * rate - low for p in range(results) for tap in range(taps))
    flops *= sum(0 <= at <= (pixels - 1) * spread and at % spread == 0 for at in seen)
  return flops
