// Conversions between fp32 and 16-bit numbers; to nearest, ties to even, NaN stays NaN.

__device__ __forceinline__ float float_of_f16(u16 bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}

__device__ __forceinline__ u16 f16_of_float(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u16 bf16_of_float(float value) {
#if __CUDA_ARCH__ >= 800
    u16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
#else
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return u16(0x7fff);
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 f16x2_of_floats(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ u32 bf16x2_of_floats(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
#endif
