// In place of shared/ptx/smem.cuh.
inline u32 smem_address(const void* pointer) { return machine::address(pointer); }
inline void load_shared(float (&out)[4], u32 address) { std::memcpy(out, machine::shared(address), sizeof out); }
