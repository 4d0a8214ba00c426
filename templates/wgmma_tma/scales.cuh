// Scales of e4m3, and of fp32 cut in two: what the sums of a tile are multiplied by first of all.
// The including template has defined kSplit, kRowBlocks, kBlockN, kHalf, kWarpScaleBytes (a warp's place in shared memory: gate's, then
// up's) and `apply_scale`, which multiplies a sum by those of its row and column.

// Those of a warp's tile. Beside the sums no registers are left for the columns', and to load them in the epilogue exposes the
// wait: they are loaded ahead of the main loop and lie in shared memory until then. Of rows and columns beyond the matrix they
// are any: nobody stores those.
struct WarpScales {
    u32 staged;                 // where the columns' lie: kWarpScaleBytes
    float rows[kRowBlocks][2];  // those of this thread's rows
    u32 signs;                  // kSplit: of all that this lane loaded, set where one is marked

    // `row`: the warp's first one. The lanes have met since the last tile's were read: to store it.
    __device__ __forceinline__ void load(const Params& p, int row, int column, int lane) {
        constexpr int kRun = (kBlockN + 31) / 32;
        const int last_row = p.x_row_scales ? p.m - 1 : 0;
        const int last_column = p.weight_row_scales ? p.n - 1 : 0;
        float gate[kRun], up[kRun];  // of columns lane, lane + 32, ...
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) {
            rows[i / 2][i % 2] = p.x_scale[min(row + i / 2 * 64 + i % 2 * 8 + lane / 4, last_row)];
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const int c = min(column + i * 32 + lane, last_column);
            gate[i] = static_cast<const float*>(p.gate_scale)[c];
            up[i] = static_cast<const float*>(p.up_scale)[c];
        }
        signs = 0;
#pragma unroll
        for (int i = 0; i < 2 * kRowBlocks; ++i) signs |= __float_as_uint(rows[i / 2][i % 2]);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            if (i * 32 + lane >= kBlockN) break;
            signs |= __float_as_uint(gate[i]) | __float_as_uint(up[i]);
            st_shared_u32(staged + (i * 32 + lane) * 4, __float_as_uint(gate[i]));
            st_shared_u32(staged + (kBlockN + i * 32 + lane) * 4, __float_as_uint(up[i]));
        }
        __syncwarp();
    }

    // Sums of codes to sums of what they stand for. kSplit: whether a scale that this lane loaded is marked.
    __device__ __forceinline__ bool apply(float (&sums)[kRowBlocks][kBlockN], int lane) const {
#pragma unroll
        for (int block = 0; block < kBlockN / 8; ++block) {
            float of_gate[2], of_up[2];
            const u32 at = staged + (block * 8 + (lane & 3) * 2) * 4;
            ld_shared_f32x2(of_gate, at);
            ld_shared_f32x2(of_up, at + kBlockN * 4);
#pragma unroll
            for (int i = 0; i < 4 * kRowBlocks; ++i) {
                const int block_row = i / 4, upper = i / 2 % 2, pair = i % 2;
                float& gate_sum = sums[block_row][block * 4 + upper * 2 + pair];
                float& up_sum = sums[block_row][kHalf + block * 4 + upper * 2 + pair];
                gate_sum = apply_scale(gate_sum, rows[block_row][upper], of_gate[pair]);
                up_sum = apply_scale(up_sum, rows[block_row][upper], of_up[pair]);
            }
        }
        return kSplit && signs >> 31;
    }
};
