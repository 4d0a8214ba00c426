// Position in the ring of kStages stages; the phase is the parity that its barriers wait for.
struct RingCursor {
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ void advance(int steps) {
        const int position = stage + steps;
        stage = position % kStages;
        phase ^= (position / kStages) & 1;
    }
};
