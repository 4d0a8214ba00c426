// In place of shared/ptx/smem.cuh.
inline u32 smem_address(const void* pointer) { return machine::address(pointer); }
inline void ld_shared_f32x4(float (&out)[4], u32 address) { std::memcpy(out, machine::shared(address, 16), 16); }
inline void ld_shared_f32x2(float (&out)[2], u32 address) { std::memcpy(out, machine::shared(address, 8), 8); }

inline u32 ld_shared_u32(u32 smem) {
    u32 value;
    std::memcpy(&value, machine::shared(smem, 4), 4);
    return value;
}

inline void st_shared_u32(u32 smem, u32 value) { std::memcpy(machine::shared(smem, 4), &value, 4); }

inline void st_shared_f32x2(u32 smem, float first, float second) {
    const float both[] = {first, second};
    std::memcpy(machine::shared(smem, 8), both, 8);
}
