// fp32 numbers for the tensor cores of fp16: each is high + low, two numbers of 11 bits. Design: docs/kernels/wgmma_tma.md.
// Ahead of the product the operands are cut in two: 32 neighbours along K become 32 high parts and 32 low ones, in as many
// bytes. So that they fit, every row of x and every column of the weights is brought near 2^14 by a power of two.

// Where the parts go: rows of `row_bytes`, a whole number of 128. Mirrors `SplitParams` in crates/swiglu-runtime/src/split.rs.
struct SplitParams {
    u8* x;     // [m] rows
    u8* gate;  // [n] rows, whichever index of the weights is contiguous
    u8* up;
    float* x_scale;  // [m]: what the sums of a row are to be multiplied by; negative where a number is not finite
    float* gate_scale;  // [n]
    float* up_scale;
    i64 row_bytes;
};

constexpr int kSplitThreads = 256;
constexpr int kSplitRun = 8;       // numbers of one thread, neighbours along K
constexpr int kSplitColumns = 32;  // columns of N-major weights of one block

// The largest finite magnitude of some numbers, as bits, and whether others are not finite.
struct Largest {
    u32 bits = 0, is_odd = 0;

    __device__ __forceinline__ void see(float value) {
        const u32 magnitude = __float_as_uint(value) & 0x7fffffffu;
        if (magnitude >= 0x7f800000u) is_odd = 1;
        else bits = max(bits, magnitude);
    }

    __device__ __forceinline__ void join(u32 other_bits, u32 other_is_odd) {
        bits = max(bits, other_bits);
        is_odd |= other_is_odd;
    }

    // Beyond these exponents the factor or its inverse would be no normal number.
    __device__ __forceinline__ int exponent() const { return max(int(bits >> 23) - 127, -110); }
    __device__ __forceinline__ float factor() const { return __uint_as_float(u32(127 + 14 - exponent()) << 23); }

    __device__ __forceinline__ float scale() const {
        return __uint_as_float(u32(127 - 14 + exponent()) << 23 | is_odd << 31);
    }
};

// Of a block's threads, in all of them.
__device__ __forceinline__ Largest largest_of_block(Largest mine) {
    __shared__ u32 bits[kSplitThreads], is_odd[kSplitThreads];
    bits[threadIdx.x] = mine.bits;
    is_odd[threadIdx.x] = mine.is_odd;
    for (int width = kSplitThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < width) {
            bits[threadIdx.x] = max(bits[threadIdx.x], bits[threadIdx.x + width]);
            is_odd[threadIdx.x] |= is_odd[threadIdx.x + width];
        }
    }
    __syncthreads();
    return {bits[0], is_odd[0]};
}

// kCount neighbours along K from `k` on, of a row whose parts begin at `row`. What is not finite counts as 0: those sums
// are taken anew.
template <int kCount>
__device__ __forceinline__ void store_parts(u8* row, int k, const float (&values)[kCount], float factor) {
    Vector<u16, kCount> high, low;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const bool is_finite = (__float_as_uint(values[i]) & 0x7fffffffu) < 0x7f800000u;
        const float scaled = is_finite ? values[i] * factor : 0.0f;
        high.value[i] = f16_of_float(scaled);
        low.value[i] = f16_of_float(scaled - float_of_f16(high.value[i]));
    }
    u8* at = row + k / 32 * 128 + k % 32 * 2;
    *reinterpret_cast<Vector<u16, kCount>*>(at) = high;
    *reinterpret_cast<Vector<u16, kCount>*>(at + 64) = low;
}

__device__ __forceinline__ void load_run(float (&values)[kSplitRun], const float* row, int k, int end) {
#pragma unroll
    for (int i = 0; i < kSplitRun; i += 4) {
        if (k + i + 4 <= end) {
            const auto four = *reinterpret_cast<const Vector<float, 4>*>(row + k + i);
#pragma unroll
            for (int e = 0; e < 4; ++e) values[i + e] = four.value[e];
        } else {
#pragma unroll
            for (int e = 0; e < 4; ++e) values[i + e] = k + i + e < end ? row[k + i + e] : 0.0f;
        }
    }
}

// One row that is contiguous along K; the second time it comes from L2.
__device__ __forceinline__ void split_row(const float* row, int k, u8* parts, float* scale) {
    Largest largest;
    float values[kSplitRun];
    for (int at = threadIdx.x * kSplitRun; at < k; at += kSplitThreads * kSplitRun) {
        load_run(values, row, at, k);
#pragma unroll
        for (int i = 0; i < kSplitRun; ++i) largest.see(values[i]);
    }
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) *scale = largest.scale();
    for (int at = threadIdx.x * kSplitRun; at < (k + 31) / 32 * 32; at += kSplitThreads * kSplitRun) {
        load_run(values, row, at, k);
        store_parts(parts, at, values, largest.factor());
    }
}

// kSplitColumns columns of an [k, n] matrix from `column` on.
__device__ __forceinline__ void split_columns(const float* matrix, i64 stride, int k, int n, int column, u8* parts,
                                              i64 row_bytes, float* scales) {
    constexpr int kRows = kSplitThreads / kSplitColumns;
    const int across = threadIdx.x % kSplitColumns, down = threadIdx.x / kSplitColumns;
    const auto at = [&](int row) { return row < k && column + across < n ? matrix[row * stride + column + across] : 0.0f; };
    Largest mine;
    for (int row = down; row < k; row += kRows) mine.see(at(row));
    __shared__ u32 bits[kRows][kSplitColumns], is_odd[kRows][kSplitColumns];
    bits[down][across] = mine.bits;
    is_odd[down][across] = mine.is_odd;
    __syncthreads();
    // From here on a thread has four neighbours along K of one column.
    __shared__ float tile[32][kSplitColumns + 1];
    const int own = threadIdx.x / kRows, first = threadIdx.x % kRows * 4;
    Largest largest;
#pragma unroll
    for (int row = 0; row < kRows; ++row) largest.join(bits[row][own], is_odd[row][own]);
    if (first == 0 && column + own < n) scales[column + own] = largest.scale();
    for (int row = 0; row < k; row += 32) {
        __syncthreads();
#pragma unroll
        for (int step = 0; step < 32; step += kRows) tile[down + step][across] = at(row + down + step);
        __syncthreads();
        const float values[4] = {tile[first][own], tile[first + 1][own], tile[first + 2][own], tile[first + 3][own]};
        if (column + own < n) store_parts(parts + (column + own) * row_bytes, row + first, values, largest.factor());
    }
}

// A block for each row of x, then for each row, or 32 columns, of gate and of up.
extern "C" __global__ void __launch_bounds__(kSplitThreads)
    swiglu_split(const __grid_constant__ SplitParams to, const __grid_constant__ Params p) {
    int block = blockIdx.x;
    if (block < p.m) return split_row(static_cast<const float*>(p.x) + block * p.x_stride, p.k, to.x + block * to.row_bytes, to.x_scale + block);
    block -= p.m;
    const int blocks = kWeightMajor == WeightMajor::k_major ? p.n : (p.n + kSplitColumns - 1) / kSplitColumns;
    const bool is_up = block >= blocks;
    if (is_up) block -= blocks;
    const auto* weight = static_cast<const float*>(is_up ? p.up : p.gate);
    const i64 stride = is_up ? p.up_stride : p.gate_stride;
    u8* parts = is_up ? to.up : to.gate;
    float* scales = is_up ? to.up_scale : to.gate_scale;
    if constexpr (kWeightMajor == WeightMajor::k_major) split_row(weight + block * stride, p.k, parts + block * to.row_bytes, scales + block);
    else split_columns(weight, stride, p.k, p.n, block * kSplitColumns, parts, to.row_bytes, scales);
}

// ---- what is not finite ----
__device__ __forceinline__ bool is_marked(float scale) { return __float_as_uint(scale) >> 31; }

// One element in plain fp32.
__device__ __forceinline__ float plain_sum(const Params& p, const void* weight, i64 stride, const void* bias, int row, int column) {
    constexpr bool kContiguous = kWeightMajor == WeightMajor::k_major;
    const auto* x = static_cast<const float*>(p.x) + row * p.x_stride;
    const auto* w = static_cast<const float*>(weight) + (kContiguous ? column * stride : column);
    float sum = 0.0f;
#pragma unroll 1
    for (int k = 0; k < p.k; ++k) sum = fmaf(x[k], w[k * (kContiguous ? 1 : stride)], sum);
    return bias != nullptr ? sum + static_cast<const float*>(bias)[column] : sum;
}

// Those of a stored strip of 16 rows whose row of x or column of the weights holds what is not finite: it has no parts.
__device__ __forceinline__ void sum_anew(const Params& p, int row, int column, int lane) {
    if (lane == 0) tma_store_wait();  // what the copy engine writes, is written
    __syncwarp();
    const auto* gate_scales = static_cast<const float*>(p.gate_scale);
    const auto* up_scales = static_cast<const float*>(p.up_scale);
#pragma unroll 1
    for (int i = lane; i < 16 * kBlockN; i += 32) {
        const int r = row + i / kBlockN, c = column + i % kBlockN;
        if (r >= p.m || c >= p.n) continue;
        if (!is_marked(p.x_scale[r]) && !is_marked(gate_scales[c]) && !is_marked(up_scales[c])) continue;
        const float gate = plain_sum(p, p.gate, p.gate_stride, p.gate_bias, r, c);
        const float up = plain_sum(p, p.up, p.up_stride, p.up_bias, r, c);
        static_cast<float*>(p.z)[r * p.z_stride + c] = activate<kActivation, false>(gate) * up;
        if (p.saved_gate != nullptr) {
            static_cast<float*>(p.saved_gate)[r * p.saved_gate_stride + c] = gate;
            static_cast<float*>(p.saved_up)[r * p.saved_up_stride + c] = up;
        }
    }
}
