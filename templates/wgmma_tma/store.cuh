// The epilogue's stores of the kernels on TMA and wgmma: 16-row strips of one warp, by the copy engine.
// The including template has defined kDType, kStoreCols, kStoreRowBytes, kStoreBytes and kStoreBuffers.

// Byte offset of 16-byte chunk `chunk` of row `row` in a swizzled store buffer.
__device__ __forceinline__ u32 store_offset(int row, int chunk) {
    const int twist = kStoreRowBytes == 128  ? row & 7
                      : kStoreRowBytes == 64 ? (row >> 1) & 3
                      : kStoreRowBytes == 32 ? (row >> 2) & 1
                                             : 0;
    return row * kStoreRowBytes + ((chunk ^ twist) << 4);
}

// One warp's 16 rows into a store buffer at `target`, in 16 bits.
template <typename Value>
__device__ __forceinline__ void store_pairs(const Value& value, int first, u32 target, int lane) {
#pragma unroll
    for (int chunk = 0; chunk < kStoreCols / 8; chunk += 2) {  // 16 rows x 16 columns at a time, then perhaps 8
        constexpr int kChunks = kStoreCols / 8;
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < (chunk + 1 < kChunks ? 4 : 2); ++i) {
            const int index = (first + chunk * 8) / 2 + i * 2;
            packed[i] = pack<kDType>(value(index), value(index + 1));
        }
        if (chunk + 1 < kChunks) {
            stmatrix_x4(target + store_offset(lane & 15, chunk + (lane >> 4)), packed[0], packed[1], packed[2],
                        packed[3]);
        } else {
            stmatrix_x2(target + store_offset(lane & 15, chunk), packed[0], packed[1]);
        }
    }
}

// The same in fp32.
template <typename Value>
__device__ __forceinline__ void store_floats(const Value& value, int first, u32 target, int lane) {
#pragma unroll
    for (int i = 0; i < kStoreCols / 4; ++i) {  // 8 rows x 8 columns at a time
        const int index = first / 2 + i * 2, row = i % 2 * 8 + lane / 4, chunk = i / 2 * 2 + (lane & 3) / 2;
        st_shared_f32x2(target + store_offset(row, chunk) + (lane & 1) * 8, value(index), value(index + 1));
    }
}

// Stores kStoreCols columns (from `first`, a compile-time constant after unrolling) of one warp's 16 rows;
// value(i) is what the thread's accumulator i has become; a policy says how it leaves L2.
template <typename Value, typename... Policy>
__device__ __forceinline__ void store_strip(const Value& value, int first, const TensorMap* map, u32 staging, int& buffer,
                                            int row, int column, int lane, const Policy&... policy) {
    if (lane == 0) tma_store_wait_read<kStoreBuffers - 1>();
    __syncwarp();
    const u32 target = staging + buffer * kStoreBytes;
    if constexpr (kStoreRowBytes == 4 * kStoreCols) store_floats(value, first, target, lane);
    else store_pairs(value, first, target, lane);
    fence_async_shared();
    __syncwarp();
    if (lane == 0) {
        tma_store(map, target, column + first, row, policy...);
        tma_store_commit();
    }
    buffer = buffer + 1 == kStoreBuffers ? 0 : buffer + 1;
}
