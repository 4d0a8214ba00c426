// Programmatic dependent launch (sm_90): the next kernel of the stream may start, up to its own wait, before this one ends.
// A kernel touches no memory that another kernel may write or read before it has waited.

__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In force once every block of the grid has called it or ended.
__device__ __forceinline__ void grid_dependents_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
