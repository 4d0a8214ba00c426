// Two 16-bit numbers in a register (sm_80).

// a * b + c, each rounded once; numbers below the normal ones count.
template <bool kBf16> __device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
    u32 result;
    if constexpr (kBf16) {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    } else {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    }
    return result;
}
