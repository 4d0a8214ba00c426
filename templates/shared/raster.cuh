// Raster order: which tile of z a block computes. Neighbours in time share rows of x and of the weights in L2.

struct TileIdx { int m, n; };

__device__ __forceinline__ TileIdx tile_of_block(int block, int tiles_m, int tiles_n, int along_n, int group) {
    const int tiles_fast = along_n ? tiles_n : tiles_m;
    const int tiles_slow = along_n ? tiles_m : tiles_n;
    const int first = block / (group * tiles_slow) * group;
    const int width = min(group, tiles_fast - first);
    const int within = block % (group * tiles_slow);
    const int fast = first + within % width;
    const int slow = within / width;
    return along_n ? TileIdx{slow, fast} : TileIdx{fast, slow};
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
