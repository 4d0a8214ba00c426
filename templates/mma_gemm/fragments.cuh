// Operands of mma_gemm in shared memory and in registers. Reads the constants of the template that includes it.

// One operand: kBlock rows (or columns) of the output by kBlockK of the sums, of which a warp reads fragments of 16.
template <OperandMajor kMajor, int kBlock> struct Operand {
    static constexpr bool kDepth = kMajor == OperandMajor::depth;
    using InSmem = Tile<kDepth ? kBlock : kBlockK, kDepth ? kRowBytes : kBlock * kElementBytes, !kDepth && kWords>;
    using Copies = Copy<InSmem>;

    // --- copies: tile after tile along the sums ---
    const char* next;  // this thread's first address in the next tile
    i64 stride_bytes;

    __device__ __forceinline__ void begin(const MatrixRef& matrix, int outer) {
        stride_bytes = matrix.stride * kElementBytes;
        const char* corner = static_cast<const char*>(matrix.data);
        corner += kDepth ? outer * stride_bytes : i64(outer) * kElementBytes;
        next = Copies::first(corner, stride_bytes);
    }

    // `outers` and `depths` remain from the tile's corner to the matrix's edge.
    template <bool kInside> __device__ __forceinline__ void load(u32 tile, int outers, int depths) {
        const int rows = kDepth ? outers : depths, row_elements = kDepth ? depths : outers;
        Copies::template start<kInside>(tile, next, stride_bytes, rows, row_elements * kElementBytes);
        next += kDepth ? i64(kRowBytes) : kBlockK * stride_bytes;
    }
};

// Where this lane reads fragments of an operand, from the start of its tile. Steps and fragments move the address by adding
// whole rows and by flipping chunk bits, which the swizzle lets pass.
template <OperandMajor kMajor, int kBlock> struct FragmentReader {
    using InSmem = typename Operand<kMajor, kBlock>::InSmem;
    u32 lane_offset;

    // `first`: of the warp's rows (or columns) in the tile.
    __device__ __forceinline__ explicit FragmentReader(int first) {
        const int lane = threadIdx.x % 32;
        if constexpr (kMajor == OperandMajor::depth) {
            lane_offset = InSmem::offset(first + lane % 16, lane / 16);
        } else if constexpr (!kWords) {
            lane_offset = InSmem::offset(lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2);
        } else {
            const int element = first + lane / 4;
            lane_offset = InSmem::offset(lane % 4, element / 4) + element % 4 * 4;
        }
    }

    // Fragment i of a step: rows (or columns) 0 to 7 and 8 to 15 of the lower half of the depth, then of the upper.
    __device__ __forceinline__ void read(u32 (&out)[4], u32 tile, int step, int i) const {
        if constexpr (kMajor == OperandMajor::depth) {
            ldmatrix_x4(out, ((tile + lane_offset) ^ (step * kStepBytes)) + i * 16 * kRowBytes);
        } else if constexpr (!kWords) {
            ldmatrix_x4_trans(out, ((tile + lane_offset) ^ (i * 32)) + step * 16 * InSmem::kSpanBytes);
        } else {
            // ldmatrix cannot transpose 32-bit elements.
            const u32 low = ((tile + lane_offset) ^ (i * 64)) + step * 8 * InSmem::kSpanBytes, high = low ^ 32;
            out[0] = ld_shared_u32(low);
            out[1] = ld_shared_u32(high);
            out[2] = ld_shared_u32(low + 4 * InSmem::kSpanBytes);
            out[3] = ld_shared_u32(high + 4 * InSmem::kSpanBytes);
        }
        if constexpr (kDType == DType::tf32) {
#pragma unroll
            for (int r = 0; r < 4; ++r) out[r] = round_to_tf32(out[r]);
        }
    }
};

using Left = Operand<kLeft, kBlockM>;
using Right = Operand<kRight, kBlockN>;
constexpr int kLeftBytes = Left::InSmem::kBytes;
constexpr int kStageBytes = kLeftBytes + Right::InSmem::kBytes;
static_assert(kLeftBytes % 1024 == 0 && kStageBytes % 1024 == 0, "mma_gemm: flipped bits must be those of whole spans");
static_assert(kLeft == OperandMajor::depth || (kFragmentsM & (kFragmentsM - 1)) == 0, "mma_gemm: fragments along the rows");
static_assert(kRight == OperandMajor::depth || (kFragmentsN & (kFragmentsN - 1)) == 0, "mma_gemm: fragments along the columns");

// Sums of 16 rows by 8 columns each.
using Accumulators = float[kFragmentsM][2 * kFragmentsN][4];

// The operands of a step, ahead of its products. Each fragment of the left one is replaced by the next step's as soon as its
// row is multiplied; the right one, which every row needs, has two copies.
struct Fragments {
    FragmentReader<kLeft, kBlockM> left_reader;
    FragmentReader<kRight, kBlockN> right_reader;
    u32 left[kFragmentsM][4], right[2][kFragmentsN][4];

    __device__ __forceinline__ Fragments(int warp_m0, int warp_n0) : left_reader(warp_m0), right_reader(warp_n0) {}

    __device__ __forceinline__ void read_first(u32 stage) {
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) left_reader.read(left[i], stage, 0, i);
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) right_reader.read(right[0][j], stage + kLeftBytes, 0, j);
    }

    __device__ __forceinline__ void read_next_right(int step, u32 next_stage) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
            right_reader.read(right[(step + 1) % 2][j], next_stage + kLeftBytes, (step + 1) % kSteps, j);
        }
    }

    __device__ __forceinline__ void multiply(int step, u32 next_stage, Accumulators& sums) {
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) {
                const auto& columns = right[step % 2][j];
                mma_sync<kDType>(sums[i][2 * j], left[i], columns[0], columns[2]);
                mma_sync<kDType>(sums[i][2 * j + 1], left[i], columns[1], columns[3]);
            }
            left_reader.read(left[i], next_stage, (step + 1) % kSteps, i);
        }
    }
};
