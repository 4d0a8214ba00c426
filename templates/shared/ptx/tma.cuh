// Bulk tensor copies (TMA, sm_90), two-dimensional; coordinates are {inner, outer}.

// Opaque CUtensorMap, passed by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(u32 destination, const TensorMap* map, u32 barrier, int inner, int outer) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(inner), "r"(outer)
        : "memory");
}

// The same; `policy` says how what it reads leaves L2.
__device__ __forceinline__ void tma_load(u32 destination, const TensorMap* map, u32 barrier, int inner, int outer,
                                         const StreamPolicy& policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(inner), "r"(outer), "l"(policy.bits)
        : "memory");
}

// Brings a box into L2, where every write goes too: allowed before grid_dependency_wait.
__device__ __forceinline__ void tma_prefetch_l2(const TensorMap* map, int inner, int outer) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(inner), "r"(outer)
                 : "memory");
}

// One read of L2, written at the same offset in every CTA whose bit is set in `mask`; each CTA's own barrier at the
// same offset counts the bytes.
__device__ __forceinline__ void tma_load_multicast(u32 destination, const TensorMap* map, u32 barrier, int inner,
                                                   int outer, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(inner), "r"(outer), "h"(mask)
        : "memory");
}

// The same with a policy.
__device__ __forceinline__ void tma_load_multicast(u32 destination, const TensorMap* map, u32 barrier, int inner,
                                                   int outer, u16 mask, const StreamPolicy& policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(inner), "r"(outer), "h"(mask), "l"(policy.bits)
        : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, u32 source, int inner, int outer) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(source), "r"(inner), "r"(outer)
                 : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, u32 source, int inner, int outer, const StreamPolicy& policy) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(map),
                 "r"(source), "r"(inner), "r"(outer), "l"(policy.bits)
                 : "memory");
}

// Adds to what is there: one addition an element, so that its result does not depend on any order.
__device__ __forceinline__ void tma_reduce_add(const TensorMap* map, u32 source, int inner, int outer) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(source), "r"(inner), "r"(outer)
                 : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending store groups of this thread still read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until what this thread's stores wrote is there.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
