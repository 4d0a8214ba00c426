// Number formats: storage types and their conversions, without toolkit headers.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#include "shared/ptx/convert.cuh"

enum class DType { f32, tf32, f16, bf16 };

struct f16 { u16 bits; };
struct bf16 { u16 bits; };

template <DType> struct ElementOf;
template <> struct ElementOf<DType::f32> { using Type = float; };
template <> struct ElementOf<DType::tf32> { using Type = float; };
template <> struct ElementOf<DType::f16> { using Type = f16; };
template <> struct ElementOf<DType::bf16> { using Type = bf16; };

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(f16 value) { return float_of_f16(value.bits); }

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

// Every conversion from float rounds to nearest, ties to even, and keeps NaN.
template <typename Element> __device__ __forceinline__ Element from_float(float value);

template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }

template <> __device__ __forceinline__ f16 from_float<f16>(float value) { return f16{f16_of_float(value)}; }

template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return bf16{bf16_of_float(value)}; }

// `kCount` elements that move in one access.
template <typename Element, int kCount> struct alignas(sizeof(Element) * kCount) Vector {
    Element value[kCount];
};
