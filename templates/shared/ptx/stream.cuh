// Memory that passes: used once, or not again before much else is (from sm_80 on).

// How lines leave L2.
struct StreamPolicy {
    u64 bits;

    // First, or like all others.
    __device__ __forceinline__ explicit StreamPolicy(bool is_first = true) {
#if __CUDA_ARCH__ >= 800
        u64 first, normal;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
        asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal));
        bits = is_first ? first : normal;
#endif
    }
};

// Sixteen bytes, past L1. Not through the read-only path: that asks for memory nobody writes while the kernel lives, and with
// dependent launch it lives before its predecessor has ended.
__device__ __forceinline__ void load_stream(u32 (&out)[4], const void* gmem, const StreamPolicy& policy) {
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "l"(gmem), "l"(policy.bits)
                 : "memory");
#else
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "l"(gmem)
                 : "memory");
#endif
}

// Brings the line into L2, where every write goes too: allowed before grid_dependency_wait.
__device__ __forceinline__ void prefetch_l2(const void* gmem) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(gmem) : "memory");
}
