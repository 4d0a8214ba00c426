// Warpgroup matrix multiply-accumulate (sm_90a), but for the product itself: its operand list depends on the tile, so
// it stands in the kernel's template.

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads of an accumulator above the wait that completes it.
__device__ __forceinline__ void wgmma_fence_operand(float& value) {
    asm volatile("" : "+f"(value)::"memory");
}

// Shared-memory matrix descriptor of an operand whose rows are one swizzle span (128 or 64 bytes) and whose groups of
// eight rows follow each other. leading_bytes: distance of the next span along M or N, for M- or N-major operands only.
template <int kSpanBytes>
__device__ __forceinline__ u64 wgmma_descriptor(u32 address, u32 leading_bytes) {
    constexpr u64 kLayout = kSpanBytes == 128 ? 1 : 2;
    return static_cast<u64>((address & 0x3FFFF) >> 4) | static_cast<u64>(leading_bytes >> 4) << 16 |
           static_cast<u64>(8 * kSpanBytes >> 4) << 32 | kLayout << 62;
}
