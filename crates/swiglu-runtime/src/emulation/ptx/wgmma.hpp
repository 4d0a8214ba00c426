// In place of shared/ptx/wgmma.cuh, and of the product that stands in the kernel's template. Products are done at once.
inline void wgmma_fence() {}
inline void wgmma_commit() {}
// The lanes meet, as on the machine: none releases a stage that another has yet to read.
template <int kPending> void wgmma_wait() { machine::sync_warp(); }
inline void wgmma_fence_operand(float&) {}

// Address and distance in units of 16 bytes, as on the machine, but with the CTA's bits.
template <int kSpanBytes> u64 wgmma_descriptor(u32 address, u32 leading_bytes) {
    return u64(address >> 4) | u64(leading_bytes >> 4) << 32 | u64(kSpanBytes == 128 ? 1 : 2) << 62;
}

template <DType kType> double wgmma_number(u32 address) {
    typename XOf<kType>::Type number;
    std::memcpy(&number, machine::shared(address), sizeof(number));
    return to_float(number);
}

// Of e4m3 each product, and the sum so far, keeps the 14 bits below the largest one's first; the rest is cut off
// (DeepSeek-V3, arXiv 2412.19437, section 3.5.2).
template <DType kType, int kCount> float wgmma_sum(const double (&terms)[kCount]) {
    double largest = 0.0, sum = 0.0;
    for (double term : terms) largest = std::fmax(largest, std::fabs(term)), sum += term;
    if (kType != DType::e4m3 || largest == 0.0 || !std::isfinite(sum)) return float(sum);
    const int shift = 13 - std::ilogb(largest);
    sum = 0.0;
    for (double term : terms) sum += std::trunc(std::ldexp(term, shift));
    return float(std::ldexp(sum, -shift));
}

// fp32 is multiplied as parts in fp16.
constexpr DType product_dtype(DType dtype) { return dtype == DType::f32 ? DType::f16 : dtype; }

// d[64 x 2 kAccumulators] += a[64xK] b[K x 2 kAccumulators], K = 32 bytes; each thread computes its own accumulators.
template <DType kType, bool kTransposeA, bool kTransposeB, int kAccumulators>
void wgmma_product(float (&d)[kAccumulators], u64 a, u64 b, bool accumulate) {
    const int thread = machine::current->index.x % 128;
    const u32 a_address = u32(a) << 4, b_address = u32(b) << 4, leading = u32(b >> 32 << 4) & 0x3ffff;
    const int b_span = b >> 62 == 1 ? 128 : 64;
    constexpr int kBytes = sizeof(typename XOf<kType>::Type), kDepth = 32 / kBytes;
    double row[2][kDepth];
    for (int half = 0; half < 2; ++half) {
        const int m = thread / 32 * 16 + thread % 32 / 4 + half * 8;
        for (int k = 0; k < kDepth; ++k) {
            const u32 offset = kTransposeA ? k * 128 + m * kBytes : m * 128 + k * kBytes;
            row[half][k] = wgmma_number<kType>(swizzled(a_address + offset, 128));
        }
    }
    const auto b_number = [&](int n, int k) {
        const u32 offset =
            kTransposeB ? n / (b_span / 2) * leading + k * b_span + n % (b_span / 2) * 2 : n * 128 + k * kBytes;
        return wgmma_number<kType>(swizzled(b_address + offset, b_span));
    };
    for (int i = 0; i < kAccumulators; ++i) {
        const int n = i / 4 * 8 + thread % 4 * 2 + i % 2;
        double terms[kDepth + 1] = {accumulate ? d[i] : 0.0f};
        for (int k = 0; k < kDepth; ++k) terms[1 + k] = row[i / 2 % 2][k] * b_number(n, k);
        d[i] = wgmma_sum<kType>(terms);
    }
}
