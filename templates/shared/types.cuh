// Number formats: storage types and their conversions, without toolkit headers.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#include "shared/ptx/convert.cuh"

enum class DType { f32, tf32, f16, bf16, e4m3, bf16_e4m3, f16_e4m3, bf16_int4, f16_int4 };

struct f16 { u16 bits; };
struct bf16 { u16 bits; };
struct e4m3 { u8 bits; };
struct int4x8 { u32 bits; };  // eight neighbours along K, stored plus 8, the first in the lowest bits

// Of z, the biases and what is saved; of x and the weights too where nothing below says otherwise.
template <DType> struct ElementOf;
template <> struct ElementOf<DType::f32> { using Type = float; };
template <> struct ElementOf<DType::tf32> { using Type = float; };
template <> struct ElementOf<DType::f16> { using Type = f16; };
template <> struct ElementOf<DType::bf16> { using Type = bf16; };
template <> struct ElementOf<DType::e4m3> { using Type = bf16; };
template <> struct ElementOf<DType::bf16_e4m3> { using Type = bf16; };
template <> struct ElementOf<DType::f16_e4m3> { using Type = f16; };
template <> struct ElementOf<DType::bf16_int4> { using Type = bf16; };
template <> struct ElementOf<DType::f16_int4> { using Type = f16; };

template <DType kType> struct XOf { using Type = typename ElementOf<kType>::Type; };
template <> struct XOf<DType::e4m3> { using Type = e4m3; };

template <DType kType> struct WeightOf { using Type = typename ElementOf<kType>::Type; };
template <> struct WeightOf<DType::e4m3> { using Type = e4m3; };
template <> struct WeightOf<DType::bf16_e4m3> { using Type = e4m3; };
template <> struct WeightOf<DType::f16_e4m3> { using Type = e4m3; };
template <> struct WeightOf<DType::bf16_int4> { using Type = int4x8; };
template <> struct WeightOf<DType::f16_int4> { using Type = int4x8; };

// Neighbours along K that share a scale of int4 weights: INT4_GROUP of crates/swiglu-kernels/src/problem.rs.
constexpr int kInt4Group = 128;

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(f16 value) { return float_of_f16(value.bits); }

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

__device__ __forceinline__ float to_float(e4m3 value) {
    const u32 sign = u32(value.bits & 0x80) << 24, magnitude = value.bits & 0x7f;
    if (magnitude == 0x7f) return __uint_as_float(0x7fffffffu);
    // 2^120 makes up for the exponents' biases, of the numbers below the normal ones too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 20) * 0x1p120f));
}

// Every conversion from float rounds to nearest, ties to even, and keeps NaN.
template <typename Element> __device__ __forceinline__ Element from_float(float value);

template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }

template <> __device__ __forceinline__ f16 from_float<f16>(float value) { return f16{f16_of_float(value)}; }

template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return bf16{bf16_of_float(value)}; }

// Beyond 448 the last number.
template <> __device__ __forceinline__ e4m3 from_float<e4m3>(float value) {
    const u32 bits = __float_as_uint(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return e4m3{u8(sign | 0x7f)};
    if (magnitude >= 0x43e00000u) return e4m3{u8(sign | 0x7e)};
    // Below 2^-6 the codes count steps of 2^-9; adding 2^14 rounds to such a step, which is the sum's last bit.
    if (magnitude < 0x3c800000u) return e4m3{u8(sign | (__float_as_uint(__uint_as_float(magnitude) + 0x1p14f) & 0xf))};
    return e4m3{u8(sign | (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3)))};
}

#if __CUDA_ARCH__ >= 800
template <typename Element> constexpr bool kIsF16 = false;
template <> constexpr bool kIsF16<f16> = true;

// Two neighbours of z in a register, the first one low; of formats whose z has 16 bits.
template <DType kType> __device__ __forceinline__ u32 pack(float low, float high) {
    if constexpr (kIsF16<typename ElementOf<kType>::Type>) return f16x2_of_floats(low, high);
    else return bf16x2_of_floats(low, high);
}
#endif

// `kCount` elements that move in one access.
template <typename Element, int kCount> struct alignas(sizeof(Element) * kCount) Vector {
    Element value[kCount];
};
