// ldmatrix and mma.sync (sm_80). Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8".

// Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones); lane l gives the row address l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(u32 (&out)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(smem) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&out)[4], u32 smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(smem) : "memory");
}

__device__ __forceinline__ void st_shared_u16(u32 smem, u16 value) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(smem), "h"(value) : "memory");
}

// The bits of an fp32 number, rounded to tf32 (nearest, ties away).
__device__ __forceinline__ u32 round_to_tf32(u32 bits) {
    u32 result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
    return result;
}

// Cuts fp32 numbers in two without loss: `high` keeps 11 significant bits, what tf32 holds; of the other 13 bits in `low`
// the tensor cores take the upper 11.
__device__ __forceinline__ void split_tf32(u32 (&high)[4], u32 (&low)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const float value = __uint_as_float(high[r]);
        high[r] &= 0xffffe000u;
        low[r] = __float_as_uint(value - __uint_as_float(high[r]));
    }
}

// acc[16x8] += a[16xK] b[Kx8], K = 16 for f16 and bf16, 8 for tf32.
template <DType kType> __device__ __forceinline__ void mma_sync(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kType == DType::bf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else if constexpr (kType == DType::f16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        static_assert(kType == DType::tf32, "mma_sync.cuh: tensor cores multiply f16, bf16 or tf32");
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}
