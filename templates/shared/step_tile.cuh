// Which tile of a step a block computes.

#include "shared/raster.cuh"

// The tile of a block, in one of the halves that are paired; tiles of the two halves follow each other.
struct HalfTile { int m, n, half; };

template <Paired kPaired> __device__ __forceinline__ HalfTile half_tile_of_block(const StepParams& p, int block_m, int block_n) {
    const int tiles_m = ceil_div(p.rows, block_m), tiles_n = ceil_div(p.cols, block_n);
    TileIdx tile = tile_of_block(blockIdx.x, kPaired == Paired::rows ? 2 * tiles_m : tiles_m,
                                 kPaired == Paired::columns ? 2 * tiles_n : tiles_n, p.raster_along_n, p.raster_group);
    const int half = kPaired == Paired::rows ? tile.m >= tiles_m : kPaired == Paired::columns ? tile.n >= tiles_n : 0;
    if (kPaired == Paired::rows) tile.m -= half * tiles_m;
    if (kPaired == Paired::columns) tile.n -= half * tiles_n;
    return {tile.m, tile.n, half};
}
