"""The counts on texts as the TPU's compiler writes them, by hand, and on a program of this machine."""

import jax
import jax.numpy as jnp

from omnitransfer_jax.compiled.collectives import Collective, collectives
from omnitransfer_jax.compiled.operations import Operations, operations

# ruff: noqa: E501 - the lines are as the compiler writes them
# A loop of seven turns: a product inside a fusion, an asynchronous exchange, a product written with a padded window, and a kernel.
TEXT = """HloModule jit_step, is_scheduled=true

%inside (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,16]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf, metadata={op_name="dot_general"}
}

%gather_starts (s0: bf16[8,32]) -> (bf16[8,32], bf16[32,32]) {
  %s0 = bf16[8,32]{1,0} parameter(0)
  %all-gather.1 = bf16[32,32]{1,0} all-gather(%s0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %custom-call.1 = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q0: bf16[8,32]) -> bf16[32,32] {
  %q0 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,32]{1,0} all-gather(%q0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

%gather_ends (e0: bf16[8,32]) -> bf16[32,32] {
  %e0 = bf16[8,32]{1,0} parameter(0)
  %all-gather.3 = bf16[32,32]{1,0} all-gather(%e0), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %custom-call.2 = bf16[32,32]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%condition (c: (s32[], bf16[64,32])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %c = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %seven), direction=LT
}

%body (b: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %b = (s32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%b), index=1
  %w = bf16[32,16]{1,0} constant({...})
  %v = bf16[4,8,32]{2,1,0} constant({...})
  %s = bf16[8,32]{1,0} constant({...})
  %start = (bf16[8,32]{1,0}, bf16[32,32]{1,0}) fusion(%s), kind=kCustom, calls=%gather_starts
  %step = bf16[32,32]{1,0} fusion(%s), kind=kCustom, calls=%async_collective_fusion.1
  %end = bf16[32,32]{1,0} fusion(%s), kind=kCustom, calls=%gather_ends
  %fusion.1 = bf16[64,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%inside
  %heads = bf16[64,4,8]{2,1,0} convolution(%x, %v), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf_0oi->b0f
  %a2a = ((bf16[64,32]{1,0}), bf16[64,32]{1,0}, u32[]{:S(2)}) all-to-all-start(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %done = bf16[64,32]{1,0} all-to-all-done(%a2a)
  %splash_mha_fwd.1 = (f32[8,8], bf16[2,64,8]) custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1]{0}, bf16[2,64,8]{2,1,0}, bf16[2,128,8]{2,1,0}, bf16[2,128,8]{2,1,0}}, frontend_attributes={}
  ROOT %t = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%i2, %done)
}

ENTRY %main (a: bf16[64,32]) -> f32[2,4] {
  %a = bf16[64,32]{1,0} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %t0 = (s32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[]{:T(128)}, bf16[64,32]{1,0}) while(%t0), condition=%condition, body=%body
  %g = f32[8,4]{1,0} constant({...})
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%g), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add, metadata={op_name="end"}
}
"""


def test_a_tpu_s_text():
    products = 7 * (2 * 64 * 16 * 32 + 2 * 64 * 4 * 8 * 32)
    attention = 7 * 2 * (2 * 64 * 128 * 8 * 2)
    assert operations(TEXT) == Operations(products, attention)
    assert collectives(TEXT) == [
        Collective("all-gather", "bf16", 32 * 32 * 2, (0, 1, 2, 3), 7, True, ""),  # once, though it is written in three fusions
        Collective("all-to-all", "bf16", 64 * 32 * 2, (0, 1, 2, 3), 7, True, ""),
        Collective("reduce-scatter", "f32", 4 * 8 * 4, (0, 2, 4, 6), 1, False, "end"),
    ]


def test_a_program_of_this_machine():
    def program(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(program).lower(jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))).compile().as_text()
    assert operations(text) == Operations(5 * 2 * 8 * 16 * 16, 0)
