"""Collectives read from the text of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from segjax import sharding
from segjax.tools import hlo

# Shortened from what XLA writes for a GPU: an asynchronous pair, a reduce-scatter in a computation of its own, variadic
# and loop-carried collectives.
TEXT = """HloModule jit_f, is_scheduled=true
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%wrapped (p: bf16[8,4]) -> bf16[2,4] {
  ROOT %reduce-scatter.1 = bf16[2,4]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
%body (c: (s32[], f32[3])) -> (s32[], f32[3]) {
  %x = f32[3]{0} get-tuple-element(%c), index=1
  %collective-permute = f32[3]{0} collective-permute(%x), source_target_pairs={{0,1}}
}
%cond (c: (s32[], f32[3])) -> pred[] {
  ROOT %less = pred[] compare(%c, %c), direction=LT
}
ENTRY %main (p0: bf16[8,4], p1: f32[2]) -> f32[8] {
  %all-gather-start = (f32[2]{0}, f32[8]{0}) all-gather-start(%p1), dimensions={0}
  %all-gather-done = f32[8]{0} all-gather-done(%all-gather-start)
  %start = ((bf16[8,4]), bf16[2,4]{1,0}) async-start(%p0), calls=%wrapped
  %done = bf16[2,4]{1,0} async-done(%start)
  %all-reduce = (f64[5]{0}, pred[], /*index=2*/u8[2,2]{1,0}) all-reduce(%p0, %p1, %p1), to_apply=%add
  %while = (s32[], f32[3]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""


def test_each_collective_counts_once_by_its_result_and_in_a_loop_once_a_turn():
  want = {"all-gather": [32], "reduce-scatter": [16], "all-reduce": [40 + 1 + 4], "collective-permute": [12] * 4}
  assert {kind: sizes for kind, sizes in hlo.collectives(TEXT).items() if sizes} == want


@pytest.mark.parametrize(
  "shape, size",
  [("f32[]", 4), ("(f32[2,3]{1,0}, bf16[])", 26), ("f8e4m3fn[7]", 7), ("s4[3]", 2), ("c64[2]", 16), ("token[]", 0)],
)
def test_bytes_follow_the_type(shape, size):
  assert hlo.shape_bytes(shape) == size


def test_what_xla_inserts_in_a_loop_and_behind_it_is_found():
  mesh = sharding.make_mesh(2, 4)
  split = NamedSharding(mesh, PartitionSpec("data", "space"))

  def program(x):
    x, _ = jax.lax.scan(lambda x, _: (jnp.roll(x, 1, axis=1), None), x, None, length=7)
    return jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))

  x = jax.ShapeDtypeStruct((2, 8, 4), jnp.bfloat16)
  found = hlo.collectives(jax.jit(program, in_shardings=split).lower(x).compile().as_text())
  assert len(found["collective-permute"]) == 7 and max(found["all-gather"]) in (2 * 8 * 4 * 2, 2 * 8 * 4 * 4)
