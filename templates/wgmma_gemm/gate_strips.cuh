// The gate's backward in the epilogue: a warp's rows in strips of 16 rows and kStoreCols columns. Gate and up of a strip arrive by
// TMA in a slot while those before are computed; dgate and dup take their places there, z has strips of its own.
// Two warps of a pingpong tile share the slots: whoever has done with a tile loads the next one's first strips, under that tile's
// main loop, and passes the slots on.
// The including template has defined the tile, StepMaps, what stages a warp's rows (kStagingInTurns, kSlotBytes, kStripsOfZ) and
// the strips of wgmma_tma/store.cuh.
#include "shared/ptx/mma_sync.cuh"

static_assert(!kGated || kStoreCols % 16 == 0, "a strip is whole fragments");

struct GateStrips {
    u32 staging, barriers;  // of this warp, or of the two
    int pair, consumer;     // which two, and which of them this warp is
    Cursor<kStoreBuffers> next = {};

    static constexpr int kFirstBarrier = 3;  // after those of the turns

    // Strips of a tile of kColumns: across, in all, and those loaded before the first is computed.
    template <int kColumns> static constexpr int kAcross = kColumns / kStoreCols;
    template <int kColumns> static constexpr int kCount = kRowBlocks * kAcross<kColumns>;
    template <int kColumns> static constexpr int kAhead = kStoreBuffers < kCount<kColumns> ? kStoreBuffers : kCount<kColumns>;

    // Waits until the other warp has passed the slots on.
    __device__ __forceinline__ void take() const {
        if constexpr (kStagingInTurns) named_barrier_sync(kFirstBarrier + 2 * pair + consumer, 64);
    }

    // Lets the other warp have the slots for a tile; if that is no whole one, there is none after it.
    __device__ __forceinline__ void pass_on() {
        if constexpr (kStagingInTurns) {
            __syncwarp();
            named_barrier_arrive(kFirstBarrier + 2 * pair + (consumer ^ 1), 64);
            next.advance(kCount<kBlockN>);
        }
    }

    template <int kColumns>
    __device__ __forceinline__ void load(const StepMaps& maps, int place, int strip, int row, int column) const {
        const u32 slot = staging + place * kSlotBytes, barrier = barriers + place * 8;
        const int inner = column + strip % kAcross<kColumns> * kStoreCols, outer = row + strip / kAcross<kColumns> * 64;
        mbarrier_arrive_expect(barrier, 2 * kStoreBytes);
        tma_load(slot, &maps.saved[0], barrier, inner, outer);
        tma_load(slot + kStoreBytes, &maps.saved[1], barrier, inner, outer);
    }

    // Loads the first strips of a tile; of one lane.
    template <int kColumns> __device__ __forceinline__ void begin(const StepMaps& maps, int row, int column) const {
        tma_store_wait_read<0>();
        Cursor<kStoreBuffers> slot = next;
#pragma unroll
        for (int strip = 0; strip < kAhead<kColumns>; ++strip) {
            load<kColumns>(maps, slot.stage, strip, row, column);
            slot.advance();
        }
    }

    template <int kColumns>
    __device__ __forceinline__ void finish(const StepMaps& maps, const float (&sums)[kColumns / 2], int strip, bool with_z,
                                           int row, int column, int lane) {
        if (strip == 0) take();
        if (lane == 0 && strip > 0) {
            tma_store_wait_read<0>();  // of the strip before this one, whose slot and z are free now
            const int following = strip - 1 + kAhead<kColumns>;
            if (following < kCount<kColumns>) load<kColumns>(maps, (next.stage == 0 ? kStoreBuffers : next.stage) - 1, following, row, column);
        }
        const u32 slot = staging + next.stage * kSlotBytes;
        const u32 z_strip = staging + kStoreBuffers * kSlotBytes + strip % kStripsOfZ * kStoreBytes;
        const int first = strip % kAcross<kColumns> * kStoreCols;
        mbarrier_wait(barriers + next.stage * 8, next.phase);
#pragma unroll
        for (int c = 0; c < kStoreCols; c += 16) {  // in fragments of 16 x 16, as the sums lie in a warp
            const u32 at = store_offset(lane & 15, c / 8 + (lane >> 4));
            u32 gates[4], ups[4], zs[4];
            ldmatrix_x4(gates, slot + at);
            ldmatrix_x4(ups, slot + kStoreBytes + at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float dgate[2], dup[2], z[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float up = element_of(ups[i], e), dz = sums[(first + c) / 2 + i * 2 + e];
                    const Activated act = activate_with_slope<kActivation>(element_of(gates[i], e));
                    dgate[e] = dz * up * act.slope;
                    dup[e] = dz * act.value;
                    z[e] = act.value * up;
                }
                gates[i] = pack<kDType>(dgate[0], dgate[1]);
                ups[i] = pack<kDType>(dup[0], dup[1]);
                zs[i] = pack<kDType>(z[0], z[1]);
            }
            stmatrix_x4(slot + at, gates[0], gates[1], gates[2], gates[3]);
            stmatrix_x4(slot + kStoreBytes + at, ups[0], ups[1], ups[2], ups[3]);
            stmatrix_x4(z_strip + at, zs[0], zs[1], zs[2], zs[3]);
        }
        fence_async_shared();
        __syncwarp();
        if (lane == 0) {
            const int inner = column + first, outer = row + strip / kAcross<kColumns> * 64;
            tma_store(&maps.out[0], slot, inner, outer);
            tma_store(&maps.out[1], slot + kStoreBytes, inner, outer);
            if (with_z) tma_store(&maps.out[2], z_strip, inner, outer);
            tma_store_commit();
        }
        next.advance();
    }

    static __device__ __forceinline__ float element_of(u32 pair, int which) {
        const u16 bits = u16(pair >> 16 * which);
        return kDType == DType::f16 ? to_float(f16{bits}) : to_float(bf16{bits});
    }
};
