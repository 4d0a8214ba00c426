// In place of shared/ptx/smem.cuh.
inline u32 smem_address(const void* pointer) { return machine::address(pointer); }
