// Raster order: which tile of z a block computes. Neighbours in time share rows of x and of the weights in L2.

struct TileIdx { int m, n; };

__device__ __forceinline__ TileIdx tile_of_block(int block, int tiles_m, int tiles_n, int along_n, int group) {
    const int tiles_long = along_n ? tiles_n : tiles_m;
    const int tiles_short = along_n ? tiles_m : tiles_n;
    const int first = block / (group * tiles_long) * group;
    const int width = min(group, tiles_short - first);
    const int within = block % (group * tiles_long);
    const int across = first + within % width;
    const int along = within / width;
    return along_n ? TileIdx{across, along} : TileIdx{along, across};
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
