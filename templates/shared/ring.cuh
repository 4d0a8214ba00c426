// Position in a ring of kLength places; the phase is the parity that their barriers wait for.
template <int kLength> struct Cursor {
    int stage = 0;
    u32 phase = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kLength) {
            stage = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ void advance(int steps) {
        const int position = stage + steps;
        stage = position % kLength;
        phase ^= (position / kLength) & 1;
    }
};
using RingCursor = Cursor<kStages>;
