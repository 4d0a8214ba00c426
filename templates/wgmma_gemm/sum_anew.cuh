// A step in fp32: what has no parts.

// Scales of the operands' lines. Mirrors `SplitScales` in crates/swiglu-runtime/src/split.rs.
struct SplitScales { const float *left[2], *right[2]; };

// Scales of one tile's lines.
struct TileScales { const float *left, *right; };

// Sums of parts to sums; whether a scale of this thread's is marked.
__device__ __forceinline__ bool apply_scales(float (&sums)[kRowBlocks][kAccumulators], const TileScales& scales, int row, int column,
                                             const StepParams& p, int lane) {
    u32 signs = 0;
    float of_row[kRowBlocks][2];
#pragma unroll
    for (int i = 0; i < 2 * kRowBlocks; ++i) {
        const int r = row + i / 2 * 64 + i % 2 * 8 + lane / 4;
        of_row[i / 2][i % 2] = r < p.rows ? scales.left[r] : 0.0f;
        signs |= __float_as_uint(of_row[i / 2][i % 2]);
    }
#pragma unroll
    for (int i = 0; i < kAccumulators; i += 4) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int c = column + i * 2 + (lane & 3) * 2 + pair;
            const float of_column = c < p.cols ? scales.right[c] : 0.0f;
            signs |= __float_as_uint(of_column);
#pragma unroll
            for (int rows = 0; rows < kRowBlocks; ++rows) {
#pragma unroll
                for (int upper = 0; upper < 2; ++upper) {
                    float& sum = sums[rows][i + upper * 2 + pair];
                    sum = apply_scale(sum, of_row[rows][upper], of_column);
                }
            }
        }
    }
    return signs >> 31;
}

// Number `depth` of line `line` of an operand.
template <bool kOuter>
__device__ __forceinline__ float number_of(const MatrixRef& matrix, int line, int depth) {
    return static_cast<const float*>(matrix.data)[kOuter ? depth * matrix.stride + line : line * matrix.stride + depth];
}

// Those of a stored strip of 16 rows whose row or column holds what is not finite, in plain fp32. Sums of these are not finite
// either, so that to add them to what is there is right whatever of them has been added.
__device__ __forceinline__ void sum_anew(const StepParams& p, const TileScales& scales, int half, int row, int column, int lane) {
    if (lane == 0) tma_store_wait();  // what the copy engine writes, is written
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * kBlockN; i += 32) {
        const int r = row + i / kBlockN, c = column + i % kBlockN;
        if (r >= p.rows || c >= p.cols) continue;
        if (!is_marked(scales.left[r]) && !is_marked(scales.right[c])) continue;
        float sum = 0.0f;
#pragma unroll 1
        for (int d = 0; d < (kPaired == Paired::depth ? 2 : 1) * p.depth && sum == sum; ++d) {
            const int second = d >= p.depth, at = d - second * p.depth;
            const float left = number_of<kLeft == OperandMajor::outer>(p.left[kPaired == Paired::rows ? half : second], r, at);
            const float right = number_of<kRight == OperandMajor::outer>(p.right[kPaired == Paired::columns ? half : second], c, at);
            sum = fmaf(left, right, sum);
        }
        if (kStep == Step::down && p.bias != nullptr) sum += static_cast<const float*>(p.bias)[c];
        float& out = static_cast<float*>(p.out[half].data)[r * p.out[half].stride + c];
        out = kAdd ? out + sum : sum;
    }
}
