// What becomes of one sum of a step, element by element: the epilogue of kernels without a better one.

template <typename Element> __device__ __forceinline__ float load_element(const MatrixRef& matrix, int row, int column) {
    return to_float(static_cast<const Element*>(matrix.data)[row * matrix.stride + column]);
}

template <typename Element>
__device__ __forceinline__ void store_element(const MatrixRef& matrix, int row, int column, float value) {
    static_cast<Element*>(matrix.data)[row * matrix.stride + column] = from_float<Element>(value);
}

template <Step kStep, Activation kActivation, typename Element>
__device__ __forceinline__ void finish(const StepParams& p, int half, int row, int column, float sum) {
    if constexpr (kStep == Step::dgated) {
        const float up = load_element<Element>(p.saved[1], row, column);
        const Activated act = activate_with_slope<kActivation>(load_element<Element>(p.saved[0], row, column));
        store_element<Element>(p.out[0], row, column, sum * up * act.slope);
        store_element<Element>(p.out[1], row, column, sum * act.value);
        if (p.out[2].data != nullptr) store_element<Element>(p.out[2], row, column, act.value * up);
    } else if constexpr (kStep == Step::weight_grad_add || kStep == Step::down_weight_grad_add) {
        store_element<float>(p.out[half], row, column, load_element<float>(p.out[half], row, column) + sum);
    } else {
        if (kStep == Step::down && p.bias != nullptr) sum += to_float(static_cast<const Element*>(p.bias)[column]);
        store_element<Element>(p.out[half], row, column, sum);
    }
}
