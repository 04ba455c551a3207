"""What a compiled program moves and multiplies, counted by hand in texts such as XLA writes for GPUs and TPUs."""

import jax
import jax.numpy as jnp
import pytest

from segjax.tools import costs

HEAD = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/segjax/kernels/depthwise.py"
2 "/home/me/site-packages/optax/_src/update.py"
3 "/home/me/segjax/steps.py"

FunctionNames
1 "_taps"
2 "apply_updates"
3 "train_step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=97 end_line=97 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=43 end_line=43 column=4 end_column=9}
3 {file_name_id=3 function_name_id=3 line=120 end_line=120 column=4 end_column=9}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
3 {file_location_id=2 parent_frame_id=2}

"""


def count(*lines, computations="", on_chip=False):
  """The costs of an entry computation of these lines."""
  entry = "\n".join(f"  {line}" for line in lines)
  return costs.costs(f"{HEAD}{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n", on_chip)


def moved(*lines, **options):
  return sum(cost.read for cost in count(*lines, **options)), sum(cost.written for cost in count(*lines, **options))


def test_an_operation_reads_its_operands_and_writes_its_result_and_names_for_memory_move_nothing():
  assert moved(
    "%p = f32[8,4]{1,0} parameter(0)",
    "%q = bf16[8,4]{1,0} parameter(1)",
    "%view = f32[32]{0} bitcast(%p)",
    "%both = (f32[32]{0}, bf16[8,4]{1,0}) tuple(%view, %q)",
    "%first = f32[32]{0} get-tuple-element(%both), index=0",
    "ROOT %copy = f32[32]{0} copy(%first)",
  ) == (128, 128)


SLICING = """
%sliced (a: f32[100,8], b: s32[], c: f32[8]) -> f32[8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[8]{0} parameter(2)
  %flat = f32[800]{0} bitcast(%a)
  %slice = f32[8]{0} dynamic-slice(%flat, %b), dynamic_slice_sizes={8}
  %other = f32[1,8]{1,0} slice(%a), slice={[3:4], [0:8]}
  %row = f32[8]{0} bitcast(%other)
  %sum = f32[8]{0} add(%slice, %row)
  ROOT %all = f32[8]{0} add(%sum, %c)
}
"""
ARGUMENTS = ("%x = f32[100,8]{1,0} parameter(0)", "%i = s32[] parameter(1)", "%y = f32[8]{0} parameter(2)")


def test_a_fusion_that_takes_slices_reads_these_and_never_more_than_all():
  read, written = moved(
    *ARGUMENTS, "%f = f32[8]{0} fusion(%x, %i, %y), kind=kLoop, calls=%sliced", computations=SLICING
  )
  assert (read, written) == (2 * 32 + 4 + 32, 32)
  whole = SLICING.replace("add(%sum, %c)", "add(%sum, %reduced)").replace(
    "  ROOT", "  %reduced = f32[8]{0} reduce(%a, %c), dimensions={0}, to_apply=%add\n  ROOT"
  )
  assert moved(*ARGUMENTS, "%f = f32[8]{0} fusion(%x, %i, %y), kind=kLoop, calls=%sliced", computations=whole) == (
    3200 + 4 + 32,
    32,
  )
  small = SLICING.replace("100,8", "1,8").replace("f32[800]", "f32[8]")
  arguments = ("%x = f32[1,8]{1,0} parameter(0)", *ARGUMENTS[1:])
  assert moved(*arguments, "%f = f32[8]{0} fusion(%x, %i, %y), kind=kLoop, calls=%sliced", computations=small) == (
    32 + 4 + 32,
    32,
  )


UPDATING = """
%updating (a: f32[100,8], b: s32[], c: f32[8]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[8]{0} parameter(2)
  %row = f32[1,8]{1,0} bitcast(%c)
  ROOT %update = f32[100,8]{1,0} dynamic-update-slice(%a, %row, %b, %b)
}
"""


def test_what_is_written_in_place_counts_as_its_part():
  read, written = moved(
    *ARGUMENTS, "%f = f32[100,8]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%updating", computations=UPDATING
  )
  assert (read, written) == (4 + 32, 32)
  assert moved(
    *ARGUMENTS, "%r = f32[1,8]{1,0} bitcast(%y)", "%u = f32[100,8]{1,0} dynamic-update-slice(%x, %r, %i, %i)"
  ) == (32, 32)
  # What goes on with the updated array is not in place: it reads all and writes all.
  further = UPDATING.replace("ROOT %update", "%update").replace(
    "\n}", "\n  ROOT %n = f32[100,8]{1,0} negate(%update)\n}"
  )
  fusion = "%f = f32[100,8]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%updating"
  assert moved(*ARGUMENTS, fusion, computations=further) == (3200 + 4 + 32, 3200)


def test_a_fusion_of_several_results_writes_each():
  body = """
%two (a: f32[100,8], b: s32[], c: f32[8]) -> (f32[100,8], f32[8]) {
  %a = f32[100,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[8]{0} parameter(2)
  %row = f32[1,8]{1,0} bitcast(%c)
  %update = f32[100,8]{1,0} dynamic-update-slice(%a, %row, %b, %b)
  %n = f32[8]{0} negate(%c)
  ROOT %both = (f32[100,8]{1,0}, f32[8]{0}) tuple(%update, %n)
}
"""
  fusion = "%f = (f32[100,8]{1,0}, f32[8]{0}) fusion(%x, %i, %y), kind=kLoop, calls=%two"
  assert moved(*ARGUMENTS, fusion, computations=body) == (4 + 32, 32 + 32)


def test_an_operation_of_several_results_writes_each_too():
  body = """
%sums (a: f32[100,8]) -> (f32[8], f32[8]) {
  %a = f32[100,8]{1,0} parameter(0)
  %zero = f32[] constant(0)
  ROOT %both = (f32[8]{0}, f32[8]{0}) reduce(%a, %a, %zero, %zero), dimensions={0}, to_apply=%add
}
"""
  fusion = "%f = (f32[8]{0}, f32[8]{0}) fusion(%x), kind=kInput, calls=%sums"
  assert moved("%x = f32[100,8]{1,0} parameter(0)", fusion, computations=body) == (3200, 64)


def test_a_loop_counts_once_a_turn_and_both_branches_of_a_conditional():
  bodies = """
%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%c), index=1
  %n = f32[8]{0} negate(%x)
  ROOT %t = (s32[], f32[8]{0}) tuple(%c, %n)
}
%cond (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  ROOT %i = s32[] get-tuple-element(%c), index=0
}
%branch (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %copy = f32[8]{0} copy(%x)
}
"""
  lines = (
    "%p = f32[8]{0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%t = (s32[], f32[8]{0}) tuple(%i, %p)",
    '%w = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}',
    "%c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%branch, %branch}",
  )
  found = count(*lines, computations=bodies)
  assert [(cost.kind, cost.times, cost.moved) for cost in found] == [
    ("negate", 5, 5 * 64),
    ("copy", 1, 64),
    ("copy", 1, 64),
  ]


def test_asynchronous_pairs_count_once():
  wrapped = """
%wrapped (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %s = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}
"""
  assert moved(
    "%p = f32[8]{0} parameter(0)",
    "%g = (f32[8]{0}, f32[64]{0}) all-gather-start(%p), dimensions={0}",
    "%h = f32[64]{0} all-gather-done(%g)",
    "%start = ((f32[8]{0}), f32[2]{0}) async-start(%p), calls=%wrapped",
    "%done = f32[2]{0} async-done(%start)",
    computations=wrapped,
  ) == (32 + 32, 256 + 8)
  assert moved(
    "%p = f32[100,8]{1,0} parameter(0)",
    "%s = ((f32[100,8]{1,0}), f32[1,8]{1,0}, s32[]) slice-start(%p), slice={[3:4], [0:8]}",
    "%part = f32[1,8]{1,0} slice-done(%s)",
    "%i = s32[] constant(0)",
    "%u = ((f32[100,8]{1,0}, f32[1,8]{1,0}), f32[100,8]{1,0}, u32[]) dynamic-update-slice-start(%p, %part, %i, %i)",
    "%all = f32[100,8]{1,0} dynamic-update-slice-done(%u)",
  ) == (32 + 32, 32 + 32)


def test_on_tpu_tiles_are_filled_and_memory_of_the_chip_is_free():
  lines = (
    "%p = bf16[2,5,3]{2,1,0:T(8,128)(2,1)} parameter(0)",
    "%start = (bf16[2,5,3]{2,1,0:T(8,128)(2,1)S(1)}, bf16[2,5,3]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p)",
    "%done = bf16[2,5,3]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%start)",
    "%n = bf16[2,5,3]{2,1,0:T(8,128)(2,1)} negate(%done)",
  )
  whole = 2 * 2 * 8 * 128
  assert moved(*lines, on_chip=True) == (whole, whole)
  assert moved(*lines) == (2 * whole, 2 * whole)


def test_scratch_memory_of_libraries_is_not_written():
  call = '%g = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
  config = 'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
  found = count("%a = bf16[64,32]{1,0} parameter(0)", "%b = bf16[32,16]{1,0} parameter(1)", call + config)
  assert [(cost.moved, cost.flops, cost.numbers) for cost in found] == [
    (2 * (64 * 32 + 32 * 16 + 64 * 16), 2 * 64 * 32 * 16, "bf16")
  ]


WINDOW = "window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"


@pytest.mark.parametrize(
  "call, operands, result",
  [
    ("convolution(%a, %b)", ("f32[2,9,9,4]", "f32[3,3,4,8]"), "f32[2,5,5,8]"),
    ('custom-call(%a, %b), custom_call_target="__cudnn$convForward"', ("f32[2,9,9,4]", "f32[3,3,4,8]"), "f32[2,5,5,8]"),
    (
      'custom-call(%a, %b), custom_call_target="__cudnn$convBackwardInput"',
      ("f32[2,5,5,8]", "f32[3,3,4,8]"),
      "f32[2,9,9,4]",
    ),
    (
      'custom-call(%a, %b), custom_call_target="__cudnn$convBackwardFilter"',
      ("f32[2,9,9,4]", "f32[2,5,5,8]"),
      "f32[3,3,4,8]",
    ),
  ],
)
def test_a_convolution_and_its_gradients_multiply_what_meets_the_image(call, operands, result):
  lines = [f"%{name} = {shape} parameter({n})" for n, (name, shape) in enumerate(zip("ab", operands))]
  (found,) = count(
    *lines, f"%c = ({result}, u8[0]) {call}, {WINDOW}" if "cudnn" in call else f"%c = {result} {call}, {WINDOW}"
  )
  # Of five rows of results the first and the last meet two of three rows of the kernel, the others all.
  assert found.flops == 2 * 2 * 4 * 8 * (2 + 3 + 3 + 3 + 2) ** 2 and found.numbers == "f32"


def test_the_holes_of_a_dilated_image_and_groups_are_not_multiplied():
  lines = ("%a = bf16[1,3,3,8] parameter(0)", "%b = bf16[2,2,1,8] parameter(1)")
  window = "window={size=2x2 pad=1_1x1_1 lhs_dilate=2x2}, dim_labels=b01f_01io->b01f, feature_group_count=8"
  (found,) = count(*lines, f"%c = bf16[1,6,6,8] convolution(%a, %b), {window}")
  # Each of six rows of results meets one row of the image and one of the holes or the padding.
  assert found.flops == 2 * 8 * 6**2 and found.numbers == "bf16"


def test_products_within_fusions_count_by_their_numbers_and_place():
  body = """
%product (a: f32[4,6], b: f32[6,5]) -> f32[4,5] {
  %a = f32[4,6]{1,0} parameter(0)
  %b = f32[6,5]{1,0} parameter(1)
  %dot = f32[4,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, operand_precision={highest,highest}, metadata={op_name="jit(step)/transpose(jvp(f))/dot" stack_frame_id=2}
  ROOT %n = f32[4,5]{1,0} negate(%dot)
}
"""
  fusion = (
    '%f = f32[4,5]{1,0} fusion(%a, %b), kind=kOutput, calls=%product, metadata={op_name="jit(step)/add" stack_frame_id=3},'
    ' backend_config={"window_config":{"estimated_cycles":"1234"}}'
  )
  copy = '%c = f32[4,5]{1,0} copy(%f), metadata={op_name="jit(step)/copy" stack_frame_id=3}'
  lines = ("%a = f32[4,6]{1,0} parameter(0)", "%b = f32[6,5]{1,0} parameter(1)", fusion, copy)
  product, copied = count(*lines, "%last = f32[4,5]{1,0} copy(%c)", computations=body)[:2]
  assert (product.flops, product.numbers, product.cycles) == (2 * 4 * 5 * 6, "f32 highest", 1234)
  assert product.place == "kernels/depthwise.py:97 _taps (backward)"
  assert copied.place == "steps.py:120 train_step"  # Whose own line called optax.


def test_costs_of_a_program_are_those_of_its_arrays():
  """On CPU, whose text is of another writer than the ones above."""

  def program(x, kernel):
    return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x @ kernel), x)

  x, kernel = jnp.zeros((64, 32)), jnp.zeros((32, 32))
  found = costs.costs(jax.jit(program).lower(x, kernel).compile().as_text(), on_chip=False)
  assert sum(cost.flops for cost in found) == 3 * 2 * 64 * 32 * 32
  assert sum(cost.moved for cost in found) >= 3 * (2 * x.nbytes + kernel.nbytes)
  assert any(cost.place.startswith("test_costs.py:") for cost in found)
