"""The warpgroup multiply's wrapper: its instruction names every accumulator, so it is generated."""

from __future__ import annotations


def wgmma_source(tokens: int, weight_type: str) -> str:
    """A CUDA function `wgmma(accumulator, a0..a3, tokens, accumulate)` of shape 64 x tokens x 32.

    accumulator: int[tokens / 2]. a0..a3: the weights' registers, bytes of `weight_type` "s8" | "u8".
    tokens: descriptor of the int8 activations in shared memory.
    """
    return _source(f"m64n{tokens}k32.s32.{weight_type}.s8", "int", "+r", tokens // 2, "p")


def wgmma_half_source(columns: int) -> str:
    """A CUDA function `wgmma(accumulator, a0..a3, b, accumulate)` of shape 64 x columns x 16.

    accumulator: float[columns / 2]. a0..a3: the first operand's registers, pairs of float16.
    b: descriptor of the second, float16, in shared memory.
    """
    plain = "p, 1, 1, 0"  # no operand is negated or transposed
    return _source(f"m64n{columns}k16.f32.f16.f16", "float", "+f", columns // 2, plain)


def _source(shape: str, element: str, constraint: str, count: int, modifiers: str) -> str:
    accumulators = ", ".join(f"%{i}" for i in range(count))
    bindings = ", ".join(f'"{constraint}"(d[{i}])' for i in range(count))
    a0, a1, a2, a3, descriptor, accumulate = (f"%{count + i}" for i in range(6))
    instruction = f"wgmma.mma_async.sync.aligned.{shape}"
    return f"""\
static __device__ __forceinline__ void wgmma({element} (&d)[{count}], unsigned a0, unsigned a1,
                                             unsigned a2, unsigned a3, unsigned long long b,
                                             bool accumulate) {{
  asm volatile(
      "{{.reg .pred p;\\nsetp.ne.b32 p, {accumulate}, 0;\\n"
      "{instruction} {{{accumulators}}}, {{{a0}, {a1}, {a2}, {a3}}}, {descriptor}, {modifiers};}}"
      : {bindings}
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(int(accumulate)));
}}
"""
