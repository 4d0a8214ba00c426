// Number formats: storage types and their conversions, without toolkit headers.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

enum class DType { f32, tf32, f16, bf16 };

struct f16 { u16 bits; };
struct bf16 { u16 bits; };

template <DType> struct ElementOf;
template <> struct ElementOf<DType::f32> { using Type = float; };
template <> struct ElementOf<DType::tf32> { using Type = float; };
template <> struct ElementOf<DType::f16> { using Type = f16; };
template <> struct ElementOf<DType::bf16> { using Type = bf16; };

__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float to_float(f16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }

// Every conversion from float rounds to nearest, ties to even, and keeps NaN.
template <typename Element> __device__ __forceinline__ Element from_float(float value);

template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }

template <> __device__ __forceinline__ f16 from_float<f16>(float value) {
    f16 result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) {
#if __CUDA_ARCH__ >= 800
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
#else
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{u16(0x7fff)};
    return bf16{u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// `kCount` elements that move in one access.
template <typename Element, int kCount> struct alignas(sizeof(Element) * kCount) Vector {
    Element value[kCount];
};
