// cp.async: copies from global to shared memory that pass no register (sm_80).

#include "shared/ptx/smem.cuh"

// Copies kBytes.
template <int kBytes> __device__ __forceinline__ void cp_async(u32 smem, const void* gmem) {
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(gmem) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(smem), "l"(gmem), "n"(kBytes) : "memory");
    }
}

// Copies the first `valid` bytes, fills the rest of kBytes with zeros; reads nothing when `valid` is 0.
template <int kBytes> __device__ __forceinline__ void cp_async(u32 smem, const void* gmem, int valid) {
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(smem), "l"(gmem), "n"(kBytes), "r"(valid)
                     : "memory");
    }
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are in flight.
template <int kPending> __device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
