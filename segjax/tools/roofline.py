"""What a compiled step costs a device, set against what the device can do: the roofline (Williams et al. 2009).

Counts are exact; times made from them are estimates, and lower bounds: nothing here was run.
"""

import collections
import math

from segjax.tools import costs, targets
from segjax.tools.costs import Cost
from segjax.tools.programs import Program
from segjax.tools.targets import Accelerator

PLACES = 10  # How many of the costliest are told.


def figures(program: Program) -> dict:
  """What one run of it costs one device.

  Returns:
    `hbm_bytes` read and written; `flops` of convolutions and matrix products, by the numbers they are of; `peak_bytes` of
    memory; `collectives` {kind: [how many, bytes of their results]}; `fusions`, and XLA's estimate of `cycles`, on TPU.
  """
  flops = collections.Counter()
  for cost in program.costs:
    flops[cost.numbers] += cost.flops
  return dict(
    hbm_bytes=sum(cost.moved for cost in program.costs),
    flops={numbers: count for numbers, count in sorted(flops.items()) if count},
    peak_bytes=program.peak,
    collectives={kind: [len(sizes), sum(sizes)] for kind, sizes in program.collectives.items() if sizes},
    fusions=sum(cost.times for cost in program.costs if cost.kind == "fusion"),
    cycles=sum(cost.cycles for cost in program.costs),
  )


def estimate(program: Program, known: Accelerator) -> dict:
  """Seconds that memory alone and the matrix units alone would take, and which of them binds.

  Returns:
    `hbm_seconds`, `matrix_seconds`, `binds`: "memory" or "matrix units".
  """
  memory = sum(cost.moved for cost in program.costs) / known.bandwidth
  matrix = sum(_matrix_seconds(cost, known) for cost in program.costs)
  return dict(hbm_seconds=memory, matrix_seconds=matrix, binds="memory" if memory > matrix else "matrix units")


def rate(program: Program, images: int, known: Accelerator) -> float:
  """Images a second at best, of a step on `images` of them on all devices."""
  times = estimate(program, known)
  return images / max(times["hbm_seconds"], times["matrix_seconds"])


def input_lines(rate: float, per_core: float | None, cores: int | None) -> str:
  """Images a second that the devices take at best, and what the loaders give, where that was measured.

  Args:
    rate: of `rate`.
    per_core: images/s that the loaders give per core of the hosts. None: not measured.
    cores: that read, on all hosts. None: those hosts are not at hand.
  """
  line = f"  at best              {rate:12,.1f} images/s on all devices (estimate)"
  if per_core is None:
    return line
  line += f"; at {per_core:,.1f} images/s per core, {math.ceil(rate / per_core)} cores read as many"
  if cores is not None and cores * per_core < rate:
    line += (
      f"\n  WARNING: {cores} cores read at most {cores * per_core:,.1f} images/s, so devices may wait for them. Set"
      " data.cache=memory or disk (then measure again), data.cache=device, or use hosts with more cores."
    )
  return line


def _matrix_seconds(cost: Cost, known: Accelerator) -> float:
  """Nothing for products of numbers that the matrix units do not take, as float64 on TPU: it is a lower bound."""
  return cost.flops / known.flops[cost.numbers] if cost.numbers in known.flops else 0.0


def places(program: Program, known: Accelerator | None) -> list[dict]:
  """The costliest places of the source: by XLA's cycles where it tells them, else by the time that memory or matrix units
  need for each operation; by bytes on a device of which nothing is known.
  """
  found = program.costs
  if any(cost.cycles for cost in found):
    rows = costs.by_place(found, lambda cost: cost.cycles)
  elif known:
    rows = costs.by_place(found, lambda cost: max(cost.moved / known.bandwidth, _matrix_seconds(cost, known)))
  else:
    rows = costs.by_place(found, lambda cost: cost.moved)
  every = sum(weight for _, weight, _ in rows) or 1
  return [
    dict(
      place=place,
      share=weight / every,
      operations=sum(cost.times for cost in group),
      hbm_bytes=sum(cost.moved for cost in group),
      flops=sum(cost.flops for cost in group),
      cycles=sum(cost.cycles for cost in group),
    )
    for place, weight, group in rows[:PLACES]
  ]


def row(program: Program, device) -> dict:
  """All of it, for JSON; without times on a device of which nothing is known."""
  known = targets.facts(device)
  of_device = dict(device=device.device_kind, memory=known.memory, source=known.source) if known else {}
  return figures(program) | of_device | (estimate(program, known) if known else {}) | {"places": places(program, known)}


def table(program: Program, device) -> str:
  """All of it, for people."""
  known, found = targets.facts(device), figures(program)
  lines = [f"  memory traffic       {found['hbm_bytes'] / 1e9:12,.2f} GB"]
  lines += [f"  products of {numbers:11}{n / 1e12:10,.3f} TFLOP" for numbers, n in found["flops"].items()]
  if known:
    times = estimate(program, known)
    lines[0] += f"     {1e3 * times['hbm_seconds']:8.2f} ms at {known.bandwidth / 1e12:.2f} TB/s"
    lines[-1] += f"  {1e3 * times['matrix_seconds']:8.2f} ms" + " in all" * (len(lines) > 2)
    lines.append(f"  estimate: bound by {times['binds']}; {known.source}")
  lines.append(f"  fusions              {found['fusions']:9,}")
  if found["cycles"]:
    lines.append(f"  XLA's estimate       {found['cycles'] / 1e6:12,.2f} million cycles")
  lines.append(f"  {'costliest places':60} share      GB    TFLOP  operations")
  lines += [
    f"  {place['place'][:60]:60} {100 * place['share']:4.1f} % {place['hbm_bytes'] / 1e9:7.2f} {place['flops'] / 1e12:8.3f}"
    f" {place['operations']:11,}"
    for place in places(program, known)
  ]
  return "\n".join(lines)
