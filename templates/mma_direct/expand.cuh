// Numbers of weights in 8 or 4 bits to pairs of 16-bit ones, exactly. Pairs hold neighbours of every second or fourth place:
// the order within a sum is free, and order_x brings x into the same.

#include "shared/ptx/pairs.cuh"

template <bool kBf16, bool kInt4> struct Expand;

// A word of four e4m3 codes to (0, 2) and (1, 3). Sign and the seven other bits are moved to their places; a product with a power
// of two makes up for the exponents' biases, for the numbers below the normal ones too. NaN codes read as +-480.
template <bool kBf16> struct Expand<kBf16, false> {
    static constexpr int kPairs = 2;
    static constexpr float kUnit = 1.0f;   // what 1 in a pair stands for
    static constexpr float kRaise = 0.0f;  // by which every other pair of apply_raised is too large

    __device__ __forceinline__ static u32 pair(u32 word) {  // of its upper bytes
        const u32 bits = (word & 0x80008000u) | (kBf16 ? word >> 4 & 0x07f007f0u : word >> 1 & 0x3f803f80u);
        return fma_pair<kBf16>(bits, kBf16 ? 0x7b807b80u : 0x5c005c00u, 0x80008000u);  // 2^120 or 2^8, and -0
    }

    __device__ __forceinline__ static void apply(u32 word, u32 (&pairs)[kPairs]) {
        pairs[0] = pair(word << 8);
        pairs[1] = pair(word);
    }

    __device__ __forceinline__ static void apply_raised(u32 word, u32 (&pairs)[kPairs]) { apply(word, pairs); }
};

// A word of eight int4, stored plus 8, to (i, i + 4) for i from 0 to 3, in units of kUnit. As bf16 the last eight bits are a number
// without more, below the normal ones or just above; in fp16 they are put into the last bits of 1024.
template <bool kBf16> struct Expand<kBf16, true> {
    static constexpr int kPairs = 4;
    static constexpr float kUnit = kBf16 ? 0x1p9f : 1.0f;
    static constexpr float kRaise = kBf16 ? 0x1.1p-2f : 0.0f;

    __device__ __forceinline__ static void apply(u32 word, u32 (&pairs)[kPairs]) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const u32 low = word >> i / 2 * 8;
            if constexpr (kBf16) {  // times 2^124 or, 16 times as large, 2^120; the 8 in the unit is 2^-6
                if (i % 2 == 0) pairs[i] = fma_pair<true>(low & 0x000f000fu, 0x7d807d80u, 0xbc80bc80u);
                else pairs[i] = fma_pair<true>(low & 0x00f000f0u, 0x7b807b80u, 0xbc80bc80u);
            } else if (i % 2 == 0) {  // 1024 + v
                pairs[i] = fma_pair<false>(and_or<0x000f000fu, 0x64006400u>(low), 0x3c003c00u, 0xe408e408u);
            } else {  // 1024 + 16 v, to be divided by 16
                pairs[i] = fma_pair<false>(and_or<0x00f000f0u, 0x64006400u>(low), 0x2c002c00u, 0xd480d480u);
            }
        }
    }

    // As apply, with kRaise on top of the even pairs of bf16: 1/4 + v / 512 takes one operation, and whoever knows the sum of x
    // there takes the rest off.
    __device__ __forceinline__ static void apply_raised(u32 word, u32 (&pairs)[kPairs]) {
        apply(word, pairs);
        if constexpr (kBf16) {
            pairs[0] = and_or<0x000f000fu, 0x3e803e80u>(word);
            pairs[2] = and_or<0x000f000fu, 0x3e803e80u>(word >> 8);
        }
    }
};

// Words of two neighbours each, as they lie in memory, to the pairs that Expand makes of weights at the same places.
template <bool kInt4, int kWords> __device__ __forceinline__ void order_x(const u32 (&words)[kWords], u32 (&pairs)[kWords]) {
    constexpr int kApart = kInt4 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kWords / 2; ++i) {
        const int first = kInt4 ? i / 2 * 4 + i % 2 : 2 * i;
        pairs[2 * i] = __byte_perm(words[first], words[first + kApart], 0x5410);
        pairs[2 * i + 1] = __byte_perm(words[first], words[first + kApart], 0x7632);
    }
}
