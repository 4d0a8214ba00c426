// In place of shared/ptx/relaxed.cuh.
inline u32 load_relaxed(const u32* counter) { return *counter; }
inline void store_relaxed(u32* counter, u32 value) { *counter = value; }
inline void reduce_add_relaxed(u32* counter, u32 value) { *counter += value; }
