// fp32 numbers for the tensor cores of fp16: each is high + low, two numbers of 11 bits. Design: docs/decisions/0015-fp32-in-parts.md.
// Ahead of the product the operands are cut in two: 32 neighbours along K become 32 high parts and 32 low ones, in as many
// bytes. So that they fit, every line along K (row of the left operand, column of the right) is brought near 2^14 by a power of two.

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

// A row-major matrix and where its parts go.
struct SplitMatrix {
    const float* data;
    i64 stride;  // elements from row to row
    u8* parts;   // [lines] rows of SplitParams::row_bytes
};

// One operand, or two whose products are summed: their lines are brought to one scale.
struct SplitOperand {
    SplitMatrix matrices[2];
    float* scales;  // [lines]: what sums are to be multiplied by; negative where a number is not finite
    int count;      // matrices
    int lines;      // rows along K, or columns
    int along_k;    // 1: a line is contiguous
};

// Mirrors `SplitParams` in crates/swiglu-runtime/src/split.rs.
struct SplitParams {
    SplitOperand operands[4];  // those that there are not have no lines
    i64 row_bytes;             // of k numbers, a whole number of 128
    int k;                     // length of the lines of one matrix
};

// A line that is contiguous along K; the second time it comes from L2.
__device__ __forceinline__ void split_row(const SplitOperand& operand, int k, int row, i64 row_bytes) {
    Largest largest;
    float values[kSplitRun];
    for (int i = 0; i < operand.count; ++i) {
        const SplitMatrix& matrix = operand.matrices[i];
        for (int at = threadIdx.x * kSplitRun; at < k; at += kSplitThreads * kSplitRun) {
            load_run(values, matrix.data + row * matrix.stride, at, k);
#pragma unroll
            for (int e = 0; e < kSplitRun; ++e) largest.see(values[e]);
        }
    }
    largest = largest_of_block(largest);
    if (threadIdx.x == 0) operand.scales[row] = largest.scale();
    for (int i = 0; i < operand.count; ++i) {
        const SplitMatrix& matrix = operand.matrices[i];
        for (int at = threadIdx.x * kSplitRun; at < (k + 31) / 32 * 32; at += kSplitThreads * kSplitRun) {
            load_run(values, matrix.data + row * matrix.stride, at, k);
            store_parts(matrix.parts + row * row_bytes, at, values, largest.factor());
        }
    }
}

// kSplitColumns lines that are columns, from `column` on.
__device__ __forceinline__ void split_columns(const SplitOperand& operand, int k, int column, i64 row_bytes) {
    constexpr int kRows = kSplitThreads / kSplitColumns;
    const int across = threadIdx.x % kSplitColumns, down = threadIdx.x / kSplitColumns;
    const auto at = [&](const SplitMatrix& matrix, int row) {
        return row < k && column + across < operand.lines ? matrix.data[row * matrix.stride + column + across] : 0.0f;
    };
    Largest mine;
    for (int i = 0; i < operand.count; ++i) {
        for (int row = down; row < k; row += kRows) mine.see(at(operand.matrices[i], row));
    }
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
    const bool inside = column + own < operand.lines;
    if (first == 0 && inside) operand.scales[column + own] = largest.scale();
    for (int i = 0; i < operand.count; ++i) {
        const SplitMatrix& matrix = operand.matrices[i];
        for (int row = 0; row < k; row += 32) {
            __syncthreads();
#pragma unroll
            for (int step = 0; step < 32; step += kRows) tile[down + step][across] = at(matrix, row + down + step);
            __syncthreads();
            const float values[4] = {tile[first][own], tile[first + 1][own], tile[first + 2][own], tile[first + 3][own]};
            if (inside) store_parts(matrix.parts + (column + own) * row_bytes, row + first, values, largest.factor());
        }
    }
}

// A block for each line along K, or for kSplitColumns others.
extern "C" __global__ void __launch_bounds__(kSplitThreads) swiglu_split(const __grid_constant__ SplitParams p) {
    grid_dependency_wait();
    int block = blockIdx.x;
    for (int i = 0; i < 4; ++i) {
        const SplitOperand& operand = p.operands[i];
        const int blocks = operand.along_k ? operand.lines : (operand.lines + kSplitColumns - 1) / kSplitColumns;
        if (block < blocks) {
            if (operand.along_k) split_row(operand, p.k, block, p.row_bytes);
            else split_columns(operand, p.k, block * kSplitColumns, p.row_bytes);
            return;
        }
        block -= blocks;
    }
}

// ---- at the product ----
// A scale of a row or column that holds what is not finite: its sums are taken anew.
__device__ __forceinline__ bool is_marked(float scale) { return __float_as_uint(scale) >> 31; }

// Powers of two may leave the range of fp32 together: the smaller one first.
__device__ __forceinline__ float apply_scale(float sum, float a, float b) {
    return sum * fminf(fabsf(a), fabsf(b)) * fmaxf(fabsf(a), fabsf(b));
}
