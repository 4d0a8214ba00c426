// In place of shared/ptx/mbarrier.cuh.
inline void mbarrier_init(u32 barrier, u32 arrivals) { machine::mbarrier(barrier) = {int(arrivals), int(arrivals), 0, 0}; }
inline void mbarrier_init_fence() {}

inline void mbarrier_arrive(u32 barrier) {
    auto& state = machine::mbarrier(barrier);
    --state.pending;
    machine::settle(state);
}

inline void mbarrier_arrive_expect(u32 barrier, u32 bytes) {
    machine::mbarrier(barrier).bytes += bytes;
    mbarrier_arrive(barrier);
}

inline void mbarrier_arrive_cluster(u32 barrier) { mbarrier_arrive(barrier); }

inline void mbarrier_arrive_release_cluster(u32 barrier) { mbarrier_arrive(barrier); }

inline void store_async_cluster(u32 address, u32 barrier, float a, float b, float c, float d) {
    const float values[] = {a, b, c, d};
    std::memcpy(machine::shared(address), values, sizeof values);
    auto& state = machine::mbarrier(barrier);
    state.bytes -= long(sizeof values);
    machine::settle(state);
}

inline void mbarrier_wait(u32 barrier, u32 parity) {
    while (machine::mbarrier(barrier).phase == parity) machine::wait();
}
