// Reads of memory that is used once: past L1, first to leave L2 (from sm_80 on).

struct StreamPolicy {
    u64 bits;

    __device__ __forceinline__ StreamPolicy() {
#if __CUDA_ARCH__ >= 800
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(bits));
#endif
    }
};

// Sixteen bytes. Not through the read-only path: that asks for memory nobody writes while the kernel lives, and with
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
