// In place of shared/ptx/tma.cuh: copies are done at once. Mirrors `Map` in emulation.rs.
struct alignas(64) TensorMap {
    u64 address;
    i64 rows, cols, row_bytes;
    int box_rows, box_cols, element_bytes, swizzle_bytes;
};

// The copy engine's swizzle of a shared address: 16-byte chunks by the row within the pattern.
inline u32 swizzled(u32 address, int span) {
    const u32 rows = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
    return address ^ (address >> 7 & rows) << 4;
}

template <typename Move> void for_each_in_box(const TensorMap& map, u32 smem, int inner, int outer, Move move) {
    for (int row = 0; row < map.box_rows; ++row) {
        for (int col = 0; col < map.box_cols; ++col) {
            char* staged = machine::shared(swizzled(smem + (row * map.box_cols + col) * map.element_bytes, map.swizzle_bytes));
            const bool inside = outer + row < map.rows && inner + col < map.cols;
            char* memory = reinterpret_cast<char*>(map.address) + (outer + row) * map.row_bytes + i64(inner + col) * map.element_bytes;
            move(staged, inside ? memory : nullptr, map.element_bytes);
        }
    }
}

inline void tma_prefetch_map(const TensorMap*) {}

inline void tma_load(u32 destination, const TensorMap* map, u32 barrier, int inner, int outer) {
    for_each_in_box(*map, destination, inner, outer, [](char* staged, const char* memory, int bytes) {
        if (memory) std::memcpy(staged, memory, bytes);
        else std::memset(staged, 0, bytes);
    });
    auto& state = machine::mbarrier(barrier);
    state.bytes -= long(map->box_rows) * map->box_cols * map->element_bytes;
    machine::settle(state);
}

inline void tma_load(u32 destination, const TensorMap* map, u32 barrier, int inner, int outer, const StreamPolicy&) {
    tma_load(destination, map, barrier, inner, outer);
}

inline void tma_prefetch_l2(const TensorMap*, int, int) {}

inline void tma_load_multicast(u32 destination, const TensorMap* map, u32 barrier, int inner, int outer, u16 mask) {
    for (u32 rank = 0; rank < machine::ctas.size(); ++rank) {
        if (mask >> rank & 1) tma_load((destination & 0xffffff) | rank << 24, map, (barrier & 0xffffff) | rank << 24, inner, outer);
    }
}

inline void tma_load_multicast(u32 destination, const TensorMap* map, u32 barrier, int inner, int outer, u16 mask, const StreamPolicy&) {
    tma_load_multicast(destination, map, barrier, inner, outer, mask);
}

inline void tma_store(const TensorMap* map, u32 source, int inner, int outer) {
    for_each_in_box(*map, source, inner, outer, [](const char* staged, char* memory, int bytes) {
        if (memory) std::memcpy(memory, staged, bytes);
    });
}

inline void tma_store(const TensorMap* map, u32 source, int inner, int outer, const StreamPolicy&) {
    tma_store(map, source, inner, outer);
}

inline void tma_reduce_add(const TensorMap* map, u32 source, int inner, int outer) {
    for_each_in_box(*map, source, inner, outer, [](const char* staged, char* memory, int bytes) {
        if (bytes != 4) machine::fail("only fp32 is added to");
        if (!memory) return;
        float sum, term;
        std::memcpy(&sum, memory, 4);
        std::memcpy(&term, staged, 4);
        sum += term;
        std::memcpy(memory, &sum, 4);
    });
}

inline void tma_store_commit() {}
template <int kPending> void tma_store_wait_read() {}
inline void tma_store_wait() {}
