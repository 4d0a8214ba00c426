// Where a cluster shares out the sums of one tile: its CTAs' parts meet in the first one's shared memory.
// The including template has defined kClusterK (CTAs), kSumThreads (that hold rows of the tile) and kSumBytes (of one part).

// The parts are added in the order of the sums' own. Whoever has none left to store returns false.
struct SumExchange {
    u32 sums, full, free;  // shared addresses; `full` counts in the first CTA, `free` in the others
    u32 phase = 0;

    __device__ __forceinline__ bool meet(float (&accumulators)[kAccumulators], int rank, int thread) {
        if (rank > 0) {
            mbarrier_wait(free, phase ^ 1);
            const u32 target = map_to_cta(sums + (rank - 1) * kSumBytes, 0), barrier = map_to_cta(full, 0);
#pragma unroll
            for (int i = 0; i < kAccumulators; i += 4) {
                store_async_cluster(target + (i / 4 * kSumThreads + thread) * 16, barrier, accumulators[i],
                                    accumulators[i + 1], accumulators[i + 2], accumulators[i + 3]);
            }
        } else {
            if (thread == 0) mbarrier_arrive_expect(full, (kClusterK - 1) * kSumBytes);
            mbarrier_wait(full, phase);
            for (int other = 1; other < kClusterK; ++other) {
                const u32 source = sums + (other - 1) * kSumBytes;
#pragma unroll
                for (int i = 0; i < kAccumulators; i += 4) {
                    float terms[4];
                    ld_shared_f32x4(terms, source + (i / 4 * kSumThreads + thread) * 16);
#pragma unroll
                    for (int e = 0; e < 4; ++e) accumulators[i + e] += terms[e];
                }
                mbarrier_arrive_release_cluster(map_to_cta(free, other));
            }
        }
        phase ^= 1;
        return rank == 0;
    }
};
