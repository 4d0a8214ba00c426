// Tiles of operands in shared memory, for ldmatrix and mma.sync. Reads the constants of the template that includes it.

using Element = ElementOf<kDType>::Type;
constexpr int kElementBytes = sizeof(Element);
constexpr int kWarps = kWarpsM * kWarpsN;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowBytes = kBlockK * kElementBytes;  // one K row of a tile
constexpr int kStepBytes = 32;                      // K bytes that one mma.sync consumes
constexpr int kSteps = kRowBytes / kStepBytes;
static_assert(kSteps % 2 == 0, "block_k must be an even number of mma steps");
constexpr bool kWords = kElementBytes == 4;

// A kRows x kTileRowBytes tile in shared memory. Its columns are cut into spans, one below the other, and the 16-byte
// chunks of a span are swizzled so that eight rows at one logical chunk (what ldmatrix reads) lie in eight different bank
// groups: the pattern that the copy engine writes, too.
template <int kRows, int kTileRowBytes, bool kScalarReads = false> struct Tile {
    static constexpr int kRowCount = kRows;
    static constexpr int kRowBytes = kTileRowBytes;
    static constexpr int kBytes = kRows * kTileRowBytes;
    static constexpr int kSpanBytes = kTileRowBytes < kMaxSpanBytes ? kTileRowBytes : kMaxSpanBytes;
    static constexpr int kSpanChunks = kSpanBytes / 16;

    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        // Scalar reads take four rows of two chunks at a time, ldmatrix eight rows of one.
        const int twist = kScalarReads ? (row & 3) << 1 : kSpanChunks >= 8 ? row & 7 : (row >> 1) & 3;
        return chunk / kSpanChunks * kRows * kSpanBytes + row * kSpanBytes + ((chunk % kSpanChunks ^ twist) << 4);
    }
};
