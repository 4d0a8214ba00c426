// What both stagings of mma_sync share: tiles in shared memory, fragments, products, the epilogue. Reads the constants of
// the template that includes it.

using Element = ElementOf<kDType>::Type;
constexpr int kElementBytes = sizeof(Element);
constexpr int kWarps = kWarpsM * kWarpsN;
constexpr int kThreads = 32 * kWarps;
constexpr int kFragmentsM = kBlockM / kWarpsM / 16;  // 16-row fragments of x per warp
constexpr int kFragmentsN = kBlockN / kWarpsN / 8;   // 8-column fragments of gate (and of up) per warp
constexpr int kRowBytes = kBlockK * kElementBytes;   // one K row of a tile
constexpr int kStepBytes = 32;                       // K bytes that one mma.sync consumes
constexpr int kSteps = kRowBytes / kStepBytes;
static_assert(kSteps % 2 == 0, "mma_sync: block_k must be an even number of mma steps");
constexpr bool kKMajor = kWeightMajor == WeightMajor::k_major;
constexpr bool kTf32 = kDType == DType::tf32;

// A kRows x kTileRowBytes tile in shared memory. Its columns are cut into spans, one below the other, and the 16-byte
// chunks of a span are swizzled so that eight rows at one logical chunk (what ldmatrix reads) lie in eight different bank
// groups: the pattern that the copy engine writes, too.
template <int kRows, int kTileRowBytes, bool kScalarReads = false> struct Tile {
    static constexpr int kRowCount = kRows;
    static constexpr int kRowBytes = kTileRowBytes;
    static constexpr int kBytes = kRows * kTileRowBytes;
    static constexpr int kSpanBytes = kTileRowBytes < kMaxSpanBytes ? kTileRowBytes : kMaxSpanBytes;
    static constexpr int kSpanChunks = kSpanBytes / 16;

    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        // Scalar reads take four rows of two chunks at a time, ldmatrix eight rows of one.
        const int twist = kScalarReads ? (row & 3) << 1 : kSpanChunks >= 8 ? row & 7 : (row >> 1) & 3;
        return chunk / kSpanChunks * kRows * kSpanBytes + row * kSpanBytes + ((chunk % kSpanChunks ^ twist) << 4);
    }
};

using XTile = Tile<kBlockM, kRowBytes>;
using WTile = Tile<kKMajor ? kBlockN : kBlockK, kKMajor ? kRowBytes : kBlockN * kElementBytes, !kKMajor && kTf32>;
constexpr int kStageBytes = XTile::kBytes + 2 * WTile::kBytes;
static_assert(kStageBytes % 128 == 0, "mma_sync: swizzled rows must start at multiples of 128 bytes");
static_assert(kKMajor || (kFragmentsN & (kFragmentsN - 1)) == 0, "mma_sync: n_major needs a power of two of fragments along N");
// A 16-row strip of z per warp, staged for wide stores; the padding spreads its rows over the banks.
constexpr int kStripColumns = kFragmentsN * 8;
constexpr int kStripStride = kStripColumns * kElementBytes + 16;
constexpr int kStripBytes = 16 * kStripStride;

// Where this lane reads its fragments, from the start of a stage. Steps and fragments move the address by adding
// whole rows and by flipping chunk bits, which the swizzle lets pass.
struct FragmentReader {
    u32 x_lane, w_lane;
    int column;  // of this lane's element in an 8-column fragment, for scalar reads

    __device__ __forceinline__ FragmentReader(int warp_m0, int warp_n0) {
        const int lane = threadIdx.x % 32;
        const int lane_half = lane / 8 % 2;
        const u32 lane_tile = XTile::kBytes + (lane < 16 ? 0 : WTile::kBytes);  // gate, then up
        x_lane = XTile::offset(warp_m0 + lane % 16, lane / 16);
        column = warp_n0 + lane / 4;
        if constexpr (kKMajor) w_lane = lane_tile + WTile::offset(warp_n0 + lane % 8, lane_half);
        else w_lane = lane_tile + WTile::offset(lane_half * 8 + lane % 8, warp_n0 / 8 * (kTf32 ? 0 : 1));
    }

    // The 16 rows of x of fragment i.
    __device__ __forceinline__ void read_x(u32 (&out)[4], u32 stage, int step, int i) const {
        ldmatrix_x4(out, ((stage + x_lane) ^ (step * kStepBytes)) + i * 16 * kRowBytes);
        round(out);
    }

    // Eight columns of the weights: gate low and high K half, up low and high K half.
    __device__ __forceinline__ void read_w(u32 (&out)[4], u32 stage, int step, int j) const {
        if constexpr (kKMajor) {
            ldmatrix_x4(out, ((stage + w_lane) ^ (step * kStepBytes)) + j * 8 * kRowBytes);
        } else if constexpr (!kTf32) {
            ldmatrix_x4_trans(out, ((stage + w_lane) ^ (j * 16)) + step * 16 * WTile::kSpanBytes);
        } else {
            // ldmatrix cannot transpose 32-bit elements.
            const int k = step * 8 + threadIdx.x % 4, n = column + j * 8;
            const u32 low = WTile::offset(k, n / 4) + n % 4 * 4, high = WTile::offset(k + 4, n / 4) + n % 4 * 4;
            const u32 gate = stage + XTile::kBytes, up = gate + WTile::kBytes;
            out[0] = ld_shared_u32(gate + low);
            out[1] = ld_shared_u32(gate + high);
            out[2] = ld_shared_u32(up + low);
            out[3] = ld_shared_u32(up + high);
        }
        round(out);
    }

    static __device__ __forceinline__ void round(u32 (&out)[4]) {
        if constexpr (kTf32) {
#pragma unroll
            for (int r = 0; r < 4; ++r) out[r] = round_to_tf32(out[r]);
        }
    }
};

using Accumulators = float[kFragmentsM][kFragmentsN][4];

// The operands of a step, ahead of its products: x once, the weights twice.
struct Fragments {
    u32 x[kFragmentsM][4], w[2][kFragmentsN][4];

    __device__ __forceinline__ void read_first(const FragmentReader& reader, u32 stage) {
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) reader.read_x(x[i], stage, 0, i);
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) reader.read_w(w[0][j], stage, 0, j);
    }

    __device__ __forceinline__ void read_next_weights(const FragmentReader& reader, int step, u32 next_stage) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) reader.read_w(w[(step + 1) % 2][j], next_stage, (step + 1) % kSteps, j);
    }

    // Products of `step`. Neighbours share x: the operand cache then spares most of its register reads. Each fragment of x
    // is replaced by the next step's as soon as its row is multiplied; w, which every row needs, has two copies.
    __device__ __forceinline__ void multiply(const FragmentReader& reader, int step, u32 next_stage, Accumulators& gate_acc,
                                             Accumulators& up_acc) {
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) {
                mma_sync<kDType>(gate_acc[i][j], x[i], w[step % 2][j][0], w[step % 2][j][1]);
                mma_sync<kDType>(up_acc[i][j], x[i], w[step % 2][j][2], w[step % 2][j][3]);
            }
            reader.read_x(x[i], next_stage, (step + 1) % kSteps, i);
        }
    }
};

// Adds the biases of this warp's columns, from `column` on.
__device__ __forceinline__ void add_bias(const Params& p, Accumulators& gate_acc, Accumulators& up_acc, int column) {
    const auto bias = [&](const void* vector, int n) {
        return vector && n < p.n ? to_float(static_cast<const Element*>(vector)[n]) : 0.0f;
    };
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int n = column + j * 8 + threadIdx.x % 4 * 2 + e;
            const float gate = bias(p.gate_bias, n), up = bias(p.up_bias, n);
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    gate_acc[i][j][half * 2 + e] += gate;
                    up_acc[i][j][half * 2 + e] += up;
                }
            }
        }
    }
}

// Gates and stores this warp's part of the tile; `row`, `column` is its corner in z, `strip` its own staging memory.
__device__ __forceinline__ void store_tile(const Params& p, Accumulators& gate_acc, Accumulators& up_acc, char* strip, int row,
                                           int column) {
    constexpr int kAccess = kAccessBytes / kElementBytes;
    constexpr int kAccessesPerRow = kStripColumns / kAccess;
    constexpr int kAccesses = 16 * kAccessesPerRow;
    const int lane = threadIdx.x % 32;
    if (p.gate_bias || p.up_bias) add_bias(p, gate_acc, up_acc, column);
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Vector<Element, 2> pair;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int at = half * 2 + e;
                    pair.value[e] = from_float<Element>(activate<kActivation, kFastSilu>(gate_acc[i][j][at]) * up_acc[i][j][at]);
                }
                const int offset = (half * 8 + lane / 4) * kStripStride + (j * 8 + lane % 4 * 2) * kElementBytes;
                *reinterpret_cast<Vector<Element, 2>*>(strip + offset) = pair;
            }
        }
        __syncwarp();
#pragma unroll 1  // unrolled, the wide tiles spill
        for (int access = lane; access < kAccesses; access += 32) {
            const int z_row = row + i * 16 + access / kAccessesPerRow, at = access % kAccessesPerRow * kAccess;
            if (z_row >= p.m || column + at >= p.n) continue;
            const char* staged = strip + access / kAccessesPerRow * kStripStride + at * kElementBytes;
            Element* target = static_cast<Element*>(p.z) + z_row * p.z_stride + column + at;
            if (column + at + kAccess <= p.n) {
                *reinterpret_cast<Vector<Element, kAccess>*>(target) = *reinterpret_cast<const Vector<Element, kAccess>*>(staged);
            } else {
                for (int e = 0; column + at + e < p.n; ++e) target[e] = reinterpret_cast<const Element*>(staged)[e];
            }
        }
        __syncwarp();
    }
}
