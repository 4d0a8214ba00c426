// What becomes of the sums of a step, kCount neighbours of a row at a time: the epilogue of kernels without a better one.

// How many of kCount neighbours one access of at most kBytes takes.
template <typename Element, int kBytes, int kCount>
constexpr int kPartOf = kBytes <= int(sizeof(Element)) ? 1 : kCount * int(sizeof(Element)) <= kBytes ? kCount : kBytes / int(sizeof(Element));

template <typename Element, int kBytes, int kCount>
__device__ __forceinline__ void load_line(float (&out)[kCount], const MatrixRef& matrix, int row, int column) {
    constexpr int kPart = kPartOf<Element, kBytes, kCount>;
    const Element* source = static_cast<const Element*>(matrix.data) + row * matrix.stride + column;
#pragma unroll
    for (int first = 0; first < kCount; first += kPart) {
        const auto part = *reinterpret_cast<const Vector<Element, kPart>*>(source + first);
#pragma unroll
        for (int e = 0; e < kPart; ++e) out[first + e] = to_float(part.value[e]);
    }
}

template <typename Element, int kBytes, int kCount>
__device__ __forceinline__ void store_line(const MatrixRef& matrix, int row, int column, const float (&values)[kCount]) {
    constexpr int kPart = kPartOf<Element, kBytes, kCount>;
    Element* target = static_cast<Element*>(matrix.data) + row * matrix.stride + column;
#pragma unroll
    for (int first = 0; first < kCount; first += kPart) {
        Vector<Element, kPart> part;
#pragma unroll
        for (int e = 0; e < kPart; ++e) part.value[e] = from_float<Element>(values[first + e]);
        *reinterpret_cast<Vector<Element, kPart>*>(target + first) = part;
    }
}

// Whether a step adds to fp32 outputs.
constexpr bool adds(Step step) {
    return step == Step::weight_grad_add || step == Step::down_weight_grad_add || step == Step::bias_grad_add ||
           step == Step::down_bias_grad_add;
}

// kCount sums that all lie inside the output.
template <Step kStep, Activation kActivation, typename Element, int kBytes, int kCount>
__device__ __forceinline__ void finish(const StepParams& p, int half, int row, int column, float (&sums)[kCount]) {
    if constexpr (kStep == Step::dgated) {
        float gate[kCount], up[kCount];
        load_line<Element, kBytes>(gate, p.saved[0], row, column);
        load_line<Element, kBytes>(up, p.saved[1], row, column);
        float z[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) {
            const Activated act = activate_with_slope<kActivation>(gate[e]);
            const float dz = sums[e];
            z[e] = act.value * up[e];
            gate[e] = dz * up[e] * act.slope;
            up[e] = dz * act.value;
        }
        store_line<Element, kBytes>(p.out[0], row, column, gate);
        store_line<Element, kBytes>(p.out[1], row, column, up);
        if (p.out[2].data != nullptr) store_line<Element, kBytes>(p.out[2], row, column, z);
    } else if constexpr (adds(kStep)) {
        float before[kCount];
        load_line<float, kBytes>(before, p.out[half], row, column);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sums[e] += before[e];
        store_line<float, kBytes>(p.out[half], row, column, sums);
    } else {
        if (kStep == Step::down && p.bias != nullptr) {
#pragma unroll
            for (int e = 0; e < kCount; ++e) sums[e] += to_float(static_cast<const Element*>(p.bias)[column + e]);
        }
        store_line<Element, kBytes>(p.out[half], row, column, sums);
    }
}

// kCount sums from shared memory, some of which may lie beyond the last column.
template <Step kStep, Activation kActivation, typename Element, int kBytes, int kCount>
__device__ __forceinline__ void finish_line(const StepParams& p, int half, int row, int column, const float* staged) {
    if (column + kCount <= p.cols) {
        float sums[kCount];
#pragma unroll
        for (int e = 0; e < kCount; ++e) sums[e] = staged[e];
        finish<kStep, kActivation, Element, kBytes>(p, half, row, column, sums);
    } else {
#pragma unroll 1
        for (int e = 0; column + e < p.cols; ++e) {
            float sum[1] = {staged[e]};
            finish<kStep, kActivation, Element, kBytes>(p, half, row, column + e, sum);
        }
    }
}
