// In place of shared/ptx/convert.cuh.
inline float float_of_f16(u16 bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

inline u16 f16_of_float(float value) {
    const _Float16 half = _Float16(value);
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline u16 bf16_of_float(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline u32 f16x2_of_floats(float low, float high) { return f16_of_float(low) | u32(f16_of_float(high)) << 16; }
inline u32 bf16x2_of_floats(float low, float high) { return bf16_of_float(low) | u32(bf16_of_float(high)) << 16; }
