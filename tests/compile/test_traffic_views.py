"""HBM traffic of fusions that read another view of an array: another tiling, another shape."""
from softmask_jax.compile import hlo, traffic

# A layer's slice of a stack of int8 kernels, tiled anew inside the fusion that multiplies by it; a head that is
# reshaped inside the fusion that multiplies by all of it.
VIEWS = """HloModule views, is_scheduled=true

%tiled (t0: s8[4,64,128]) -> s8[4,64,128] {
  %t0 = s8[4,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %copied = s8[4,64,128]{2,1,0:T(8,128)(4,1)} copy(%t0)
}

%sliced (s0: s8[4,64,128], s1: s32[]) -> s8[64,128] {
  %s0 = s8[4,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %view = s8[4,64,128]{2,1,0:T(8,128)(4,1)} fusion(%s0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%tiled
  %s1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  %slice = s8[1,64,128]{2,1,0:T(8,128)(4,1)} dynamic-slice(%view, %s1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %flat = s8[64,128]{1,0:T(8,128)(4,1)} bitcast(%slice)
}

%reshaped (r0: bf16[256,1,128]) -> bf16[256,128] {
  %r0 = bf16[256,1,128]{2,1,0} parameter(0)
  ROOT %bitcast = bf16[256,128]{1,0} bitcast(%r0)
}

%layer (l0: bf16[8,64], l1: s8[4,64,128], l2: s32[]) -> bf16[8,128] {
  %l0 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %l1 = s8[4,64,128]{2,1,0:T(32,128)(4,1)} parameter(1)
  %l2 = s32[]{:T(128)S(6)} parameter(2)
  %kernel = s8[64,128]{1,0:T(8,128)(4,1)} fusion(%l1, %l2), kind=kLoop, calls=%sliced
  ROOT %product = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} convolution(%l0, %kernel), dim_labels=bf_io->bf
}

%head (h0: bf16[8,128], h1: bf16[256,1,128]) -> f32[8,256] {
  %h0 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %h1 = bf16[256,1,128]{2,1,0} parameter(1)
  %weight = bf16[256,128]{1,0} fusion(%h1), kind=kLoop, calls=%reshaped
  ROOT %logits = f32[8,256]{1,0:S(1)} convolution(%h0, %weight), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[8,64], kernels: s8[4,64,128], weight: bf16[256,1,128], index: s32[]) -> f32[8,256] {
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %kernels = s8[4,64,128]{2,1,0:T(32,128)(4,1)} parameter(1)
  %weight = bf16[256,1,128]{2,1,0} parameter(2)
  %index = s32[]{:T(128)S(6)} parameter(3)
  %hidden = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %kernels, %index), kind=kOutput, calls=%layer
  ROOT %logits = f32[8,256]{1,0:S(1)} fusion(%hidden, %weight), kind=kOutput, calls=%head
}
"""


def test_of_a_stack_that_a_fusion_tiles_anew_only_the_slice_is_read_and_of_a_reshaped_head_everything():
    one_kernel, head = 64 * 128, 256 * 128 * 2
    assert traffic.measure(hlo.parse(VIEWS)).hbm == one_kernel + head
