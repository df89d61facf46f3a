"""The warpgroup multiply's wrapper: its instruction names every accumulator, so it is generated."""

from __future__ import annotations


def wgmma_source(tokens: int, weight_type: str) -> str:
    """A CUDA function `wgmma(accumulator, a0..a3, tokens, accumulate)` of shape 64 x tokens x 32.

    accumulator: int[tokens / 2]. a0..a3: the weights' registers, bytes of `weight_type` "s8" | "u8".
    tokens: descriptor of the int8 activations in shared memory.
    """
    count = tokens // 2
    accumulators = ", ".join(f"%{i}" for i in range(count))
    bindings = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    a0, a1, a2, a3, descriptor, accumulate = (f"%{count + i}" for i in range(6))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.{weight_type}.s8"
    return f"""\
static __device__ __forceinline__ void wgmma(int (&d)[{count}], unsigned a0, unsigned a1,
                                             unsigned a2, unsigned a3, unsigned long long tokens,
                                             bool accumulate) {{
  asm volatile(
      "{{.reg .pred p;\\nsetp.ne.b32 p, {accumulate}, 0;\\n"
      "{instruction} {{{accumulators}}}, {{{a0}, {a1}, {a2}, {a3}}}, {descriptor}, p;}}"
      : {bindings}
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(tokens), "r"(int(accumulate)));
}}
"""
