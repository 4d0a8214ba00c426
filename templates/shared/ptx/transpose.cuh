// Matrices of 16-bit numbers turned over within a warp (sm_75).

// Of eight rows and columns: lane i holds two neighbours of row i / 4, from column i % 4 * 2 on, before and after.
__device__ __forceinline__ u32 transpose_8x8(u32 pair) {
    u32 turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
    return turned;
}
