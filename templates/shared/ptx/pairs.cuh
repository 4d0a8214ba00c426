// Two 16-bit numbers in a register (sm_80).

// value & kMask | kBits in one instruction; written in C++ it becomes two, as only one of the constants is an immediate.
template <u32 kMask, u32 kBits> __device__ __forceinline__ u32 and_or(u32 value) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(value), "n"(kMask), "n"(kBits));
    return result;
}

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
