// What both stagings of mma_sync share: tiles in shared memory, fragments, products, the epilogue. Reads the constants of
// the template that includes it.
#include "mma_sync/tile.cuh"

constexpr int kFragmentsM = kBlockM / kWarpsM / 16;  // 16-row fragments of x per warp
constexpr int kFragmentsN = kBlockN / kWarpsN / 8;   // 8-column fragments of gate (and of up) per warp
constexpr bool kKMajor = kWeightMajor == WeightMajor::k_major;
constexpr bool kSplit = kDType == DType::f32;  // each number as a sum of two in tf32

using XTile = Tile<kBlockM, kRowBytes>;
using WTile = Tile<kKMajor ? kBlockN : kBlockK, kKMajor ? kRowBytes : kBlockN * kElementBytes, !kKMajor && kWords>;
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
        else w_lane = lane_tile + WTile::offset(lane_half * 8 + lane % 8, warp_n0 / 8 * (kWords ? 0 : 1));
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
        } else if constexpr (!kWords) {
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
        if constexpr (kDType == DType::tf32) {
#pragma unroll
            for (int r = 0; r < 4; ++r) out[r] = round_to_tf32(out[r]);
        }
    }
};

using Accumulators = float[kFragmentsM][kFragmentsN][4];

// The operands of a step, ahead of its products: x once, the weights twice.
struct Fragments {
    u32 x[kFragmentsM][4], w[2][kFragmentsN][4];
    u32 w_low[kFragmentsN][4];  // kSplit: the lower parts of this step's weights

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

    // kSplit: the products of one fragment of x, small ones first. The tensor cores cut their sums off instead of rounding
    // them, so every step starts a new sum and the accumulators are added to in fp32.
    __device__ __forceinline__ void multiply_split(u32 (&high)[4], const u32 (&w_high)[kFragmentsN][4], float (&gate)[kFragmentsN][4],
                                                   float (&up)[kFragmentsN][4]) const {
        u32 low[4];
        split_tf32(high, low);
        float gate_sum[kFragmentsN][4] = {}, up_sum[kFragmentsN][4] = {};
#pragma unroll
        for (int product = 0; product < 3; ++product) {  // outermost: neighbours do not wait for each other
            const auto& a = product == 0 ? low : high;
            const auto& b = product == 1 ? w_low : w_high;
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) {
                mma_sync<DType::tf32>(gate_sum[j], a, b[j][0], b[j][1]);
                mma_sync<DType::tf32>(up_sum[j], a, b[j][2], b[j][3]);
            }
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                gate[j][r] += gate_sum[j][r];
                up[j][r] += up_sum[j][r];
            }
        }
    }

    // Products of `step`. Neighbours share x: the operand cache then spares most of its register reads. Each fragment of x
    // is replaced by the next step's as soon as its row is multiplied; w, which every row needs, has two copies.
    __device__ __forceinline__ void multiply(const FragmentReader& reader, int step, u32 next_stage, Accumulators& gate_acc,
                                             Accumulators& up_acc) {
        if constexpr (kSplit) {
#pragma unroll
            for (int j = 0; j < kFragmentsN; ++j) split_tf32(w[step % 2][j], w_low[j]);
        }
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
            if constexpr (kSplit) {
                multiply_split(x[i], w[step % 2], gate_acc[i], up_acc[i]);
            } else {
#pragma unroll
                for (int j = 0; j < kFragmentsN; ++j) {
                    mma_sync<kDType>(gate_acc[i][j], x[i], w[step % 2][j][0], w[step % 2][j][1]);
                    mma_sync<kDType>(up_acc[i][j], x[i], w[step % 2][j][2], w[step % 2][j][3]);
                }
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

template <Output kOutput> __device__ __forceinline__ float output_of(float gate, float up) {
    if constexpr (kOutput == Output::z) return activate<kActivation, kFastSilu>(gate) * up;
    else return kOutput == Output::gate ? gate : up;
}

// kSplit: an element of an output in plain fp32. What is not finite has no lower part, and sums with it come out as NaN.
template <Output kOutput> __device__ __noinline__ float plain_element(const Params& p, int row, int column) {
    const auto* x = static_cast<const float*>(p.x) + row * p.x_stride;
    const auto* gate = static_cast<const float*>(p.gate) + (kKMajor ? column * p.gate_stride : column);
    const auto* up = static_cast<const float*>(p.up) + (kKMajor ? column * p.up_stride : column);
    float gate_acc = 0.0f, up_acc = 0.0f;
    for (int k = 0; k < p.k; ++k) {
        gate_acc = fmaf(x[k], gate[k * (kKMajor ? 1 : p.gate_stride)], gate_acc);
        up_acc = fmaf(x[k], up[k * (kKMajor ? 1 : p.up_stride)], up_acc);
    }
    if (p.gate_bias) gate_acc += static_cast<const float*>(p.gate_bias)[column];
    if (p.up_bias) up_acc += static_cast<const float*>(p.up_bias)[column];
    return output_of<kOutput>(gate_acc, up_acc);
}

template <Output kOutput> __device__ __forceinline__ Element* output_row(const Params& p, int row) {
    if constexpr (kOutput == Output::z) return static_cast<Element*>(p.z) + row * p.z_stride;
    else if constexpr (kOutput == Output::gate) return static_cast<Element*>(p.saved_gate) + row * p.saved_gate_stride;
    else return static_cast<Element*>(p.saved_up) + row * p.saved_up_stride;
}

// Stores 16 rows of this warp's part of one output; `row`, `column` is their corner in z, `strip` the warp's own staging
// memory.
template <Output kOutput>
__device__ __forceinline__ void store_strip(const Params& p, const float (&gate_acc)[kFragmentsN][4],
                                            const float (&up_acc)[kFragmentsN][4], char* strip, int row, int column) {
    constexpr int kAccess = kAccessBytes / kElementBytes;
    constexpr int kAccessesPerRow = kStripColumns / kAccess;
    constexpr int kAccesses = 16 * kAccessesPerRow;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Vector<Element, 2> pair;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int at = half * 2 + e;
                pair.value[e] = from_float<Element>(output_of<kOutput>(gate_acc[j][at], up_acc[j][at]));
            }
            const int offset = (half * 8 + lane / 4) * kStripStride + (j * 8 + lane % 4 * 2) * kElementBytes;
            *reinterpret_cast<Vector<Element, 2>*>(strip + offset) = pair;
        }
    }
    __syncwarp();
#pragma unroll 1  // unrolled, the wide tiles spill
    for (int access = lane; access < kAccesses; access += 32) {
        const int out_row = row + access / kAccessesPerRow, at = access % kAccessesPerRow * kAccess;
        if (out_row >= p.m || column + at >= p.n) continue;
        char* staged = strip + access / kAccessesPerRow * kStripStride + at * kElementBytes;
        if constexpr (kSplit) {
            auto* values = reinterpret_cast<Element*>(staged);
            for (int e = 0; e < kAccess && column + at + e < p.n; ++e) {
                const float value = to_float(values[e]);
                if (value != value) values[e] = from_float<Element>(plain_element<kOutput>(p, out_row, column + at + e));
            }
        }
        Element* target = output_row<kOutput>(p, out_row) + column + at;
        if (column + at + kAccess <= p.n) {
            *reinterpret_cast<Vector<Element, kAccess>*>(target) = *reinterpret_cast<const Vector<Element, kAccess>*>(staged);
        } else {
            for (int e = 0; column + at + e < p.n; ++e) target[e] = reinterpret_cast<const Element*>(staged)[e];
        }
    }
    __syncwarp();
}

// Gates and stores this warp's part of the tile; `row`, `column` is its corner in z.
__device__ __forceinline__ void store_tile(const Params& p, Accumulators& gate_acc, Accumulators& up_acc, char* strip, int row,
                                           int column) {
    if (p.gate_bias || p.up_bias) add_bias(p, gate_acc, up_acc, column);
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
        store_strip<Output::z>(p, gate_acc[i], up_acc[i], strip, row + i * 16, column);
        if constexpr (kOp == Op::forward_save) {
            store_strip<Output::gate>(p, gate_acc[i], up_acc[i], strip, row + i * 16, column);
            store_strip<Output::up>(p, gate_acc[i], up_acc[i], strip, row + i * 16, column);
        }
    }
}
