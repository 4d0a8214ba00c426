// What the kernels on TMA and wgmma share: the walk over the tiles, the lockstep, the main loop.
// The including template has defined the tile, `wgmma` (one product) and how an operand lies in a stage: the span of its swizzle,
// the bytes to the next span (kLeadingBytes) and to the next 32 bytes' worth of the sums (kStepBytes). kSplit: these are of high
// parts, then of low ones. kRingCtas fill each other's stages; kStream: tiles of few tokens; kLockstep: whether the CTAs keep
// together; kPromoteTiles K tiles are summed by the tensor cores before fp32 takes over (0: all).
#include "shared/ring.cuh"

// ---- raster order ----
// Bands of raster_group clusters across, walked along M (or N) and turned at each end.
struct TileOrder {
    int long_tiles;   // clusters along the walk
    int short_tiles;  // clusters across it
    int total, group;
    bool along_n;

    // tiles_m and tiles_n count clusters.
    __device__ __forceinline__ TileOrder(int tiles_m, int tiles_n, int raster_along_n, int raster_group) {
        along_n = raster_along_n;
        group = raster_group;
        long_tiles = along_n ? tiles_n : tiles_m;
        short_tiles = along_n ? tiles_m : tiles_n;
        total = tiles_m * tiles_n;
    }

    // First row and column of this CTA's tile.
    __device__ __forceinline__ void locate(int index, int rank, int& row, int& column) const {
        const int band_tiles = long_tiles * group;
        const int band = index / band_tiles;
        const int inside = index - band * band_tiles;
        const int width = min(group, short_tiles - band * group);
        int along = inside / width;
        const int across = band * group + inside - along * width;
        if (band & 1) along = long_tiles - 1 - along;
        const int tile_m = along_n ? across : along;
        const int tile_n = along_n ? along : across;
        row = (tile_m * kClusterM + (kClusterM > 1 ? rank : 0)) * kBlockM;
        column = (tile_n * kClusterN + (kClusterN > 1 ? rank : 0)) * kBlockN;
    }
};

// ---- operands ----
// What the copy engine reads of an operand: boxes of a whole tile, and those of the last tile where it has fewer rows.
struct OperandMaps { TensorMap whole, tail; };

// How many of a matrix's `size` rows (or columns) lie in the tile that begins at `first`, rounded up to `unit`. Only those are loaded:
// a row outside takes the copy engine several times as long as one inside. The tile's other sums are of whatever lay in shared
// memory, and nobody stores them.
template <int kBlock> __device__ __forceinline__ int extent_at(int first, int size, int unit) {
    return min(kBlock, (max(size - first, 0) + unit - 1) / unit * unit);
}

// ---- lockstep ----
// The CTAs start each full wave of tiles together, so that those which need the same rows of x or of the weights read them
// while they are in L2. Only a matter of speed: whoever waits in vain, because other work holds some SM or a second launch
// counts in between, goes on alone.
__device__ u32 arrivals;
constexpr int kLockstepLead = 8;     // K tiles between a CTA's arrival and the end of its output tile
constexpr int kLockstepSpins = 100;  // some 70 us

struct Lockstep {
    // Arrivals of all CTAs that this one waits for before its next tile. It waits for none at 0, and no more after a wait in
    // vain; it arrives all the same.
    u32 expected = 0;
    u32 step = gridDim.x;

    // Before any CTA can have multiplied its first tile.
    __device__ __forceinline__ void reset() const {
        if constexpr (!kLockstep) return;
        if (blockIdx.x == 0) store_relaxed(&arrivals, 0);
    }

    __device__ __forceinline__ void arrive() {
        if constexpr (!kLockstep) return;
        reduce_add_relaxed(&arrivals, 1);
        expected += step;
    }

    __device__ __forceinline__ void wait() {
        if constexpr (!kLockstep) return;
        if (expected == 0) return;
        for (int spin = 0; load_relaxed(&arrivals) < expected; ++spin) {
            if (spin == kLockstepSpins) expected = step = 0;
        }
    }
};

// ---- producer ----
// Waits until the consumers have read the stage of K tile `block`. Of few tokens two neighbours along K are asked for
// together: memory gives more where rows are read in longer pieces. A consumer keeps one stage while it waits for the next.
__device__ __forceinline__ void wait_for_stage(u32 empty, const RingCursor& cursor, int block, int k_blocks) {
    RingCursor last = cursor;
    if (kStream && kStages > 2 && block % 2 == 0 && block + 1 < k_blocks) last.advance();
    mbarrier_wait(empty + last.stage * 8, last.phase ^ 1);
}

// ---- consumer ----
// Tells the producers of the cluster that this warp no longer reads the stage.
__device__ __forceinline__ void release_stage(u32 barrier, int lane) {
    if constexpr (kRingCtas > 1) {
        if (lane < kRingCtas) mbarrier_arrive_cluster(map_to_cta(barrier, lane));
    } else {
        if (lane == 0) mbarrier_arrive(barrier);
    }
}

// Pingpong: the warpgroups run their main loops in turn. Without turns the second one would wait on a phase more than
// one ahead of the ring, which the parity cannot tell from one behind.
__device__ __forceinline__ void take_turn(int consumer) {
    named_barrier_sync(1 + consumer, 2 * kWarpgroup);
}

__device__ __forceinline__ void pass_turn(int consumer) {
    named_barrier_arrive(1 + (consumer ^ 1), 2 * kWarpgroup);
}

// Waits for all products; what reads the accumulators stays behind.
template <int kCount> __device__ __forceinline__ void finish_products(float (&accumulators)[kRowBlocks][kCount]) {
    wgmma_wait<0>();
#pragma unroll
    for (int rows = 0; rows < kRowBlocks; ++rows) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) wgmma_fence_operand(accumulators[rows][i]);
    }
}

template <int kCount>
__device__ __forceinline__ void add(float (&sums)[kRowBlocks][kCount], const float (&terms)[kRowBlocks][kCount]) {
#pragma unroll
    for (int rows = 0; rows < kRowBlocks; ++rows) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[rows][i] += terms[rows][i];
    }
}

// Products of a K tile, and which 32 bytes of its rows each takes. Of parts the small products come first, low by high and high
// by low; low by low is below the last bit of fp32.
constexpr int kProducts = kSplit ? 6 : kRowBytes / 32;
__device__ __forceinline__ constexpr int left_step(int product) { return !kSplit ? product : product < 2 ? product + 2 : product % 2; }
__device__ __forceinline__ constexpr int right_step(int product) { return !kSplit || product == 2 || product == 3 ? product : product % 2; }

// Accumulates one tile, as wide as there are accumulators; leaves every stage it read released.
template <int kCount>
__device__ __forceinline__ void multiply_tile(float (&accumulators)[kRowBlocks][kCount], RingCursor& cursor,
                                              int k_blocks, u32 stages, u32 full, u32 empty, int a_offset,
                                              int consumer, int lane) {
    constexpr bool kPromote = kPromoteTiles > 0;
    [[maybe_unused]] float sums[kRowBlocks][kCount] = {};  // what fp32 has taken over
    // Consumers of one tile take over at different times, so that the others multiply meanwhile.
    [[maybe_unused]] const int shift = kPingpong ? 0 : consumer * kPromoteTiles / kConsumers;
    if constexpr (kPingpong) take_turn(consumer);
    int previous = 0;
    for (int block = 0; block < k_blocks; ++block) {
        const u32 stage_address = stages + cursor.stage * kStageBytes;
        const u64 a = wgmma_descriptor<kRowBytes>(stage_address + a_offset, kLeadingBytesA);
        const u64 b = wgmma_descriptor<kSpanBytesB>(stage_address + kBytesA, kLeadingBytesB);
        bool first = block == 0;  // of the tensor cores' sum
        if constexpr (kPromote) {
            if (block > 0 && (block + shift) % kPromoteTiles == 0) {
                first = true;
                finish_products(accumulators);
                add(sums, accumulators);
            }
        }
        mbarrier_wait(full + cursor.stage * 8, cursor.phase);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kProducts * kRowBlocks; ++i) {
            const int product = i / kRowBlocks;
            const int rows = i % kRowBlocks;
            wgmma(accumulators[rows], a + (rows * 64 * kRowBytes + left_step(product) * kStepBytesA) / 16,
                  b + right_step(product) * kStepBytesB / 16, product > 0 || !first);
        }
        wgmma_commit();
        wgmma_wait<1>();  // this step's products are on their way, those of the step before have read their stage
        if (block > 0) release_stage(empty + previous * 8, lane);
        previous = cursor.stage;
        cursor.advance();
    }
    if constexpr (kPingpong) pass_turn(consumer);
    finish_products(accumulators);
    if constexpr (kPromote) add(accumulators, sums);
    release_stage(empty + previous * 8, lane);
}
