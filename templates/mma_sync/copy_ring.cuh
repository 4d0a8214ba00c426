// A ring of kStages K tiles that every thread helps to copy with cp.async. Reads the constants of the template that includes
// it: kAccessBytes, kStages and those of mma_sync/tile.cuh.

template <bool kValue> struct Flag { static constexpr bool value = kValue; };

// The part of the copy of a tile that falls to this thread.
template <typename Tile> struct Copy {
    static constexpr int kAccessesPerRow = Tile::kRowBytes / kAccessBytes;
    static constexpr int kRowsPerPass = kThreads / kAccessesPerRow;
    static constexpr int kPasses = (Tile::kRowCount + kRowsPerPass - 1) / kRowsPerPass;
    static_assert(kThreads % kAccessesPerRow == 0, "mma_sync: a pass over a tile must be whole rows");

    // This thread's first address in the tile at `corner`.
    static __device__ __forceinline__ const char* first(const char* corner, i64 stride_bytes) {
        return corner + threadIdx.x / kAccessesPerRow * stride_bytes + threadIdx.x % kAccessesPerRow * kAccessBytes;
    }

    // Starts the copy of a tile from this thread's `first` address on; `rows` and `bytes` remain from the tile's
    // corner to the matrix's edge, and are not looked at where the whole tile is known to lie inside.
    template <bool kInside>
    static __device__ __forceinline__ void start(u32 smem, const char* first, i64 stride_bytes, int rows, int bytes) {
        const int first_row = threadIdx.x / kAccessesPerRow;
        const int byte = threadIdx.x % kAccessesPerRow * kAccessBytes;
        const int row_valid = max(0, min(kAccessBytes, bytes - byte));
        // Two-byte accesses pass through registers; all of them in flight at once would spill.
#pragma unroll(kAccessBytes >= 4 ? kPasses : 1)
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = first_row + pass * kRowsPerPass;
            if (Tile::kRowCount % kRowsPerPass == 0 || row < Tile::kRowCount) {
                const u32 target = smem + Tile::offset(row, byte / 16) + byte % 16;
                const int valid = row < rows ? row_valid : 0;
                if constexpr (kInside) cp_async<kAccessBytes>(target, first);
                else if constexpr (kAccessBytes >= 4) cp_async<kAccessBytes>(target, first, valid);
                else st_shared_u16(target, valid ? *reinterpret_cast<const u16*>(first) : u16(0));
            }
            first += kRowsPerPass * stride_bytes;
        }
    }
};

// The main loop over `k_tiles` tiles of kBytes, of which the first `inside_tiles` need no comparison with any edge.
// `load(inside, stage, tile)` starts the copies of a tile, each tile once and in order; `read_first` reads the fragments of
// the first step, `read_next` those of the next step ahead of the products, `multiply` multiplies one step. Leaves the ring's
// memory to the epilogue.
template <int kBytes, bool kInside, typename Load, typename ReadFirst, typename ReadNext, typename Multiply>
__device__ __forceinline__ void multiply_ring(u32 ring, int k_tiles, int inside_tiles, const Load& load,
                                              const ReadFirst& read_first, const ReadNext& read_next,
                                              const Multiply& multiply) {
    // --- prologue: kStages - 1 tiles on their way ---
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < k_tiles) load(Flag<false>{}, ring + s * kBytes, s);
        cp_async_commit_group();
    }
    cp_async_wait_group<kStages - 2>();  // this thread's part of tile 0 has landed
    __syncthreads();                     // everyone's part has

    read_first();
    int tile_k = 0, stage_idx = 0, free_idx = kStages - 1;

    // One K tile: the fragments of the next step, of the next tile too, are read while this one is multiplied.
    const auto multiply_tile = [&](auto inside) {
        const int next_idx = stage_idx + 1 == kStages ? 0 : stage_idx + 1;
        const u32 free_stage = ring + free_idx * kBytes;
        const int free_tile = tile_k + kStages - 1;
        const bool refill = decltype(inside)::value || free_tile < k_tiles;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            constexpr int kLast = kSteps - 1;
            if (step == kLast) {
                cp_async_commit_group();
                cp_async_wait_group<kStages - 2>();  // this thread's part of the next tile has landed
                __syncthreads();                     // everyone's part has, and everyone has read this tile
            }
            const u32 next_stage = ring + (step == kLast ? next_idx : stage_idx) * kBytes;
            read_next(step, next_stage);
            if (step == 0 && refill) load(inside, free_stage, free_tile);
            multiply(step, next_stage);
        }
        free_idx = stage_idx;
        stage_idx = next_idx;
        ++tile_k;
    };

    // --- mainloop: first the K tiles that need no comparison with any edge ---
    while (tile_k + kStages - 1 < inside_tiles) multiply_tile(Flag<kInside>{});
    while (tile_k < k_tiles) multiply_tile(Flag<false>{});
    cp_async_wait_group<0>();
    __syncthreads();
}
