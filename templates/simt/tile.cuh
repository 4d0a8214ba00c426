// Tiles of the fp32 FMA kernels on their way from global memory into shared memory and registers.
// The including template has defined Element, kAccess (elements of one access) and kThreads.

// A kRows x kCols piece of a row-major matrix on its way from global to shared memory.
template <int kRows, int kCols> struct Tile {
    static constexpr int kAccesses = kRows * kCols / kAccess;
    static constexpr int kPerThread = (kAccesses + kThreads - 1) / kThreads;
    static constexpr int kAccessesPerRow = kCols / kAccess;
    Vector<Element, kAccess> held[kPerThread];

    // `rows` and `cols` remain from the tile's corner to the matrix's edge; beyond it there are zeros.
    __device__ __forceinline__ void fetch(const Element* corner, i64 stride, int rows, int cols) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int access = threadIdx.x + i * kThreads;
            const int row = access / kAccessesPerRow, col = access % kAccessesPerRow * kAccess;
            const Element* source = corner + row * stride + col;
            const bool inside = access < kAccesses && row < rows;
            if (inside && col + kAccess <= cols) {
                held[i] = *reinterpret_cast<const Vector<Element, kAccess>*>(source);
            } else {
#pragma unroll
                for (int e = 0; e < kAccess; ++e)
                    held[i].value[e] = inside && col + e < cols ? source[e] : from_float<Element>(0.0f);
            }
        }
    }

    // Writes element (row, col) to smem[row * kRowStep + col * kColStep].
    template <int kRowStep, int kColStep> __device__ __forceinline__ void store(float* smem) const {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
            const int access = threadIdx.x + i * kThreads;
            if (kAccesses % kThreads != 0 && access >= kAccesses) break;
            const int row = access / kAccessesPerRow, col = access % kAccessesPerRow * kAccess;
#pragma unroll
            for (int e = 0; e < kAccess; ++e) smem[row * kRowStep + (col + e) * kColStep] = to_float(held[i].value[e]);
        }
    }
};

template <int kCount> __device__ __forceinline__ void load_shared(float (&out)[kCount], const float* smem) {
    constexpr int kWidth = kCount % 4 == 0 ? 4 : kCount % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kCount; i += kWidth) {
        const auto part = *reinterpret_cast<const Vector<float, kWidth>*>(smem + i);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) out[i + e] = part.value[e];
    }
}
