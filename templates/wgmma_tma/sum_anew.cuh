// The forward in fp32: what has no parts.

// One element in plain fp32; what is NaN stays so.
__device__ __forceinline__ float plain_sum(const Params& p, const void* weight, i64 stride, const void* bias, int row, int column) {
    constexpr bool kContiguous = kWeightMajor == WeightMajor::k_major;
    const auto* x = static_cast<const float*>(p.x) + row * p.x_stride;
    const auto* w = static_cast<const float*>(weight) + (kContiguous ? column * stride : column);
    float sum = 0.0f;
#pragma unroll 1
    for (int k = 0; k < p.k && sum == sum; ++k) sum = fmaf(x[k], w[k * (kContiguous ? 1 : stride)], sum);
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
