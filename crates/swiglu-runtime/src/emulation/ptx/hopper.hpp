// In place of shared/ptx/hopper.cuh.
inline u32 cluster_cta_rank() { return machine::current->cta; }
inline u32 map_to_cta(u32 address, u32 rank) { return (address & 0xffffff) | rank << 24; }

inline void cluster_arrive() {
    machine::current->cluster_generation = machine::cluster_barrier.generation;
    machine::arrive(machine::cluster_barrier, int(machine::threads.size()));
}

inline void cluster_wait() {
    while (machine::cluster_barrier.generation == machine::current->cluster_generation) machine::wait();
}

template <int kCtas> void cluster_sync() {
    if (kCtas > 1) cluster_arrive(), cluster_wait();
    else __syncthreads();
}

template <int kRegisters> void registers_decrease() {}
template <int kRegisters> void registers_increase() {}
inline void fence_async_shared() {}
inline void named_barrier_sync(int barrier, int threads) { machine::sync(machine::cta().named[barrier], threads); }
inline void named_barrier_arrive(int barrier, int threads) { machine::arrive(machine::cta().named[barrier], threads); }

inline void stmatrix(u32 address, const u32* registers, int matrices) {
    const int lane = machine::current->lane;
    std::copy(registers, registers + matrices, machine::slot(lane));
    machine::sync_warp();
    if (lane < matrices * 8) {
        for (int column = 0; column < 8; ++column) {
            const u16 bits = u16(machine::slot(lane % 8 * 4 + column / 2)[lane / 8] >> column % 2 * 16);
            std::memcpy(machine::shared(address) + column * 2, &bits, 2);
        }
    }
    machine::sync_warp();
}

inline void stmatrix_x4(u32 address, u32 r0, u32 r1, u32 r2, u32 r3) {
    const u32 registers[] = {r0, r1, r2, r3};
    stmatrix(address, registers, 4);
}

inline void stmatrix_x2(u32 address, u32 r0, u32 r1) {
    const u32 registers[] = {r0, r1};
    stmatrix(address, registers, 2);
}
