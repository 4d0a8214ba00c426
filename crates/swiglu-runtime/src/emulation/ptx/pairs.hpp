// In place of shared/ptx/pairs.cuh.
template <u32 kMask, u32 kBits> u32 and_or(u32 value) { return (value & kMask) | kBits; }

template <bool kBf16> u32 fma_pair(u32 a, u32 b, u32 c) {
    const auto one = [](u32 pair, int half) {
        const u16 bits = u16(pair >> 16 * half);
        return kBf16 ? __uint_as_float(u32(bits) << 16) : float_of_f16(bits);
    };
    u32 result = 0;
    for (int half = 0; half < 2; ++half) {
        const float exact = std::fma(one(a, half), one(b, half), one(c, half));
        result |= u32(kBf16 ? bf16_of_float(exact) : f16_of_float(exact)) << 16 * half;
    }
    return result;
}
