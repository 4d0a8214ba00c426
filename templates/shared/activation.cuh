// The non-linearity on the gate, in fp32. Equal to `oracle::activate` up to rounding.

#include "shared/ptx/special.cuh"

enum class Activation { silu };

// kFast: one special-function instruction instead of two, at an absolute error of about |gate| * 2^-12: enough for bf16
// results only.
template <Activation kActivation, bool kFast> __device__ __forceinline__ float activate(float gate) {
    static_assert(kActivation == Activation::silu, "activation.cuh: add the formula of this activation here");
    if constexpr (kFast) {
        const float half = 0.5f * gate;  // silu(g) = h + h tanh(h), h = g / 2
        return fmaf(half, tanh_approx(half), half);
    } else {
        // g / (1 + exp(-g)): no cancellation; exp overflows to inf for very negative g, and 1 / inf = 0.
        constexpr float kLog2E = 1.4426950408889634f;
        return gate * rcp_approx(1.0f + ex2_approx(-kLog2E * gate));
    }
}

// What the gate's backward needs of one gate.
struct Activated { float value, slope; };

template <Activation kActivation> __device__ __forceinline__ Activated activate_with_slope(float gate) {
    static_assert(kActivation == Activation::silu, "activation.cuh: add the derivative of this activation here");
    constexpr float kLog2E = 1.4426950408889634f;
    const float sigmoid = rcp_approx(1.0f + ex2_approx(-kLog2E * gate));
    const float value = gate * sigmoid;
    return {value, fmaf(value, 1.0f - sigmoid, sigmoid)};  // silu' = s + g s (1 - s)
}
