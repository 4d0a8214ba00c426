// In place of shared/ptx/mma_sync.cuh. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8".
inline void ldmatrix(u32 (&out)[4], u32 smem, bool transposed) {
    if (smem % 16 != 0) machine::fail("ldmatrix: a row is not aligned to 16 bytes");
    const int lane = machine::current->lane;
    machine::slot(lane)[0] = smem;
    machine::sync_warp();
    for (int matrix = 0; matrix < 4; ++matrix) {
        u16 pair[2];
        for (int e = 0; e < 2; ++e) {
            const int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
            std::memcpy(&pair[e], machine::shared(machine::slot(matrix * 8 + row)[0]) + column * 2, 2);
        }
        out[matrix] = pair[0] | u32(pair[1]) << 16;
    }
    machine::sync_warp();
}

inline void ldmatrix_x4(u32 (&out)[4], u32 smem) { ldmatrix(out, smem, false); }
inline void ldmatrix_x4_trans(u32 (&out)[4], u32 smem) { ldmatrix(out, smem, true); }

inline void st_shared_u16(u32 smem, u16 value) { std::memcpy(machine::shared(smem), &value, 2); }

inline u32 round_to_tf32(u32 bits) {
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline void split_tf32(u32 (&high)[4], u32 (&low)[4]) {
    for (int r = 0; r < 4; ++r) {
        const float value = __uint_as_float(high[r]);
        high[r] &= 0xffffe000u;
        low[r] = __float_as_uint(value - __uint_as_float(high[r]));
    }
}

// Cut off instead of rounded, as the tensor cores do.
inline float cut_off(double sum) {
    const float value = float(sum);
    return std::fabs(double(value)) > std::fabs(sum) ? std::nextafterf(value, 0.0f) : value;
}

template <DType kType> void mma_sync(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    constexpr bool kWord = kType == DType::tf32;
    constexpr int kPerWord = kWord ? 1 : 2;  // numbers of a register
    const int lane = machine::current->lane;
    std::copy(a, a + 4, machine::slot(lane));
    machine::slot(lane)[4] = b0;
    machine::slot(lane)[5] = b1;
    machine::sync_warp();
    // Number k of a row (or column) that lanes 4 row to 4 row + 3 hold, in the registers of k's lower or upper half.
    const auto number = [](int row, int k, int lower, int upper) -> double {
        const u32 word = machine::slot(row * 4 + k / kPerWord % 4)[k / kPerWord / 4 ? upper : lower];
        if constexpr (kWord) return __uint_as_float(word & 0xffffe000u);
        const u16 bits = u16(word >> k % kPerWord * 16);
        return kType == DType::bf16 ? __uint_as_float(u32(bits) << 16) : float_of_f16(bits);
    };
    for (int e = 0; e < 4; ++e) {
        const int row = lane / 4, column = lane % 4 * 2 + e % 2;
        double sum = acc[e];
        for (int k = 0; k < 8 * kPerWord; ++k) sum += number(row, k, e / 2, 2 + e / 2) * number(column, k, 4, 5);
        acc[e] = cut_off(sum);
    }
    machine::sync_warp();
}
