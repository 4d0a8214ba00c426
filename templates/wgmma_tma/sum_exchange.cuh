// Where a cluster shares out the sums of one tile: what its CTAs have of a warpgroup's rows meets in the shared memory of one of them,
// of the first warpgroup's in the first CTA, of the second's in the second.
// The including template has defined kClusterK (CTAs), kConsumers (warpgroups), kSumThreads (of one, that hold rows of the tile) and
// kSumBytes (of one part).

// The parts are added in the order of the sums' own. Whoever has none left to store returns false.
struct SumExchange {
    u32 sums, full, free;  // shared addresses; `full` counts where the parts meet, `free`, one a warpgroup, in the other CTAs
    u32 phase = 0;

    // A single warpgroup's meet in the first CTA, which the compiler is told.
    __device__ __forceinline__ bool meet(float (&accumulators)[kAccumulators], int rank, int warpgroup, int thread) {
        if (kConsumers > 1 ? rank != warpgroup : rank > 0) {
            mbarrier_wait(free + warpgroup * 8, phase ^ 1);
            const int place = kConsumers > 1 && rank < warpgroup ? rank : rank - 1;
            const u32 target = map_to_cta(sums + place * kSumBytes, warpgroup), barrier = map_to_cta(full, warpgroup);
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
                mbarrier_arrive_release_cluster(map_to_cta(free + warpgroup * 8, other > warpgroup ? other : other - 1));
            }
        }
        phase ^= 1;
        return rank == warpgroup;
    }
};
