// Addresses in the shared-memory window, as PTX takes them.

__device__ __forceinline__ u32 smem_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }
