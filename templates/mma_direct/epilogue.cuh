// From the warps' sums to the outputs. The including template defines the tile, `Element`, `kSumSets`, `kSumStride`, `column_of`
// and `token_of`.

constexpr int kPartials = 2 * kBlockM * kSumStride;  // one set of sums, from row to row kSumStride apart

// They meet in shared memory: [set][gate, up][token][column]. `partials` is this warp's set, at its first column.
__device__ __forceinline__ void share_sums(const float (&acc)[kFragments][kTokenGroups][4], float* partials, int quad, int row) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
        for (int t = 0; t < kTokenGroups; ++t) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = t * 8 + token_of(quad * 2 + e % 2);
                partials[(e / 2 * kBlockM + token) * kSumStride + column_of(f, row)] = acc[f][t][e];
            }
        }
    }
}

// Adds the sets in their order, activates and stores. scaled(of_up, n, sum) makes of a sum what it stands for.
template <typename Scaled>
__device__ __forceinline__ void store_outputs(const Params& p, const float* partials, int m0, int n0, Scaled scaled) {
    const auto bias = [&](const void* vector, int n) {
        return vector ? to_float(static_cast<const Element*>(vector)[n]) : 0.0f;
    };
    for (int i = threadIdx.x; i < kBlockM * kBlockN; i += kThreads) {
        const int m = m0 + i / kBlockN, n = n0 + i % kBlockN;
        const float* sums = partials + i / kBlockN * kSumStride + i % kBlockN;
        if (m >= p.m || n >= p.n) continue;
        float gate = 0.0f, up = 0.0f;
#pragma unroll
        for (int set = 0; set < kSumSets; ++set) {
            gate += sums[set * kPartials];
            up += sums[set * kPartials + kBlockM * kSumStride];
        }
        gate = scaled(false, n, gate) + bias(p.gate_bias, n);
        up = scaled(true, n, up) + bias(p.up_bias, n);
        static_cast<Element*>(p.z)[m * p.z_stride + n] = from_float<Element>(activate<kActivation, kFastSilu>(gate) * up);
        if constexpr (kOp == Op::forward_save) {
            static_cast<Element*>(p.saved_gate)[m * p.saved_gate_stride + n] = from_float<Element>(gate);
            static_cast<Element*>(p.saved_up)[m * p.saved_up_stride + n] = from_float<Element>(up);
        }
    }
}
