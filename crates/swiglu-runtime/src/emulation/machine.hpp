// A GPU in miniature: the threads of one cluster at a time are fibers, switched where they wait for each other.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // statics of inline functions are one for all libraries of a process
#define __CUDA_ARCH__ 900

namespace machine {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 512 << 10;
constexpr int kPatience = 1000;  // rounds without progress after which the threads are stuck

struct Index { unsigned x = 0, y = 0, z = 0; };

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    Index index;
    int cta, warp, lane;
    unsigned cluster_generation = 0;  // of the cluster's barrier when this thread arrived
    bool done = false;
};

// Counts arrivals; whoever waits goes on when the generation changes.
struct Barrier { int arrived = 0; unsigned generation = 0; };

// What the lanes of a warp show each other.
struct Warp { Barrier barrier; uint32_t slot[kWarp][8]; };

struct MBarrier { int count = 0, pending = 0; long bytes = 0; unsigned phase = 0; };

struct Cta {
    Index index;
    std::vector<Warp> warps;
    Barrier named[16];
    std::vector<char> memory;
    std::map<uint32_t, MBarrier> mbarriers;
};

static std::vector<Thread> threads;
static std::vector<Cta> ctas;
static Barrier cluster_barrier;
static Thread* current;
static ucontext_t scheduler;
static Index block_size, grid_size;
static size_t progress;
static std::function<void()> entry;

inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

inline void wait() { swapcontext(&current->context, &scheduler); }
inline Cta& cta() { return ctas[current->cta]; }

// Shared addresses: the CTA in the top byte, the offset below.
inline uint32_t address(const void* pointer) {
    return uint32_t(current->cta) << 24 | uint32_t(static_cast<const char*>(pointer) - cta().memory.data());
}

// `size` bytes that move in one access, which begins at a multiple of them.
inline char* shared(uint32_t address, size_t size = 1) {
    Cta& owner = ctas.at(address >> 24);
    const size_t offset = address & 0xffffff;
    if (offset + size > owner.memory.size()) fail("an address outside of shared memory");
    if (offset % size != 0) fail("a misaligned access to shared memory");
    return owner.memory.data() + offset;
}

inline void arrive(Barrier& barrier, int count) {
    if (++barrier.arrived < count) return;
    barrier.arrived = 0;
    ++barrier.generation;
    ++progress;
}

inline void sync(Barrier& barrier, int count) {
    const unsigned generation = barrier.generation;
    arrive(barrier, count);
    while (barrier.generation == generation) wait();
}

inline void sync_warp() { sync(cta().warps[current->warp].barrier, kWarp); }
inline uint32_t* slot(int lane) { return cta().warps[current->warp].slot[lane]; }
inline MBarrier& mbarrier(uint32_t address) { return ctas.at(address >> 24).mbarriers[address & 0xffffff]; }

inline void settle(MBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.count;
    ++progress;
}

inline void run_thread() {
    entry();
    current->done = true;
    ++progress;
    wait();
}

// False when threads wait for each other for ever.
inline bool run_cluster() {
    int idle = 0;
    for (;;) {
        const size_t before = progress;
        bool alive = false;
        for (Thread& thread : threads) {
            if (thread.done) continue;
            alive = true;
            current = &thread;
            swapcontext(&scheduler, &thread.context);
        }
        if (!alive) return true;
        idle = progress == before ? idle + 1 : 0;
        if (idle > kPatience) return false;
    }
}

template <typename... Arguments, size_t... kIndices>
bool launch(void (*kernel)(Arguments...), const void* const* arguments, std::index_sequence<kIndices...>, unsigned grid,
            unsigned block, unsigned cluster, size_t shared_bytes) {
    entry = [=] { kernel(*static_cast<const Arguments*>(arguments[kIndices])...); };
    block_size = {block, 1, 1};
    grid_size = {grid, 1, 1};
    for (unsigned first = 0; first < grid; first += cluster) {
        ctas = std::vector<Cta>(cluster);
        threads = std::vector<Thread>(size_t(cluster) * block);
        cluster_barrier = {};
        for (unsigned rank = 0; rank < cluster; ++rank) {
            ctas[rank].index = {first + rank, 0, 0};
            ctas[rank].warps.resize(block / kWarp);
            ctas[rank].memory.assign(shared_bytes, char(0xff));  // NaN in every format: what is read unwritten shows in the sums
        }
        for (unsigned i = 0; i < threads.size(); ++i) {
            Thread& thread = threads[i];
            thread.cta = i / block;
            thread.index = {i % block, 0, 0};
            thread.warp = thread.index.x / kWarp;
            thread.lane = thread.index.x % kWarp;
            thread.stack.reset(new char[kStackBytes]);
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = thread.stack.get();
            thread.context.uc_stack.ss_size = kStackBytes;
            makecontext(&thread.context, run_thread, 0);
        }
        if (!run_cluster()) return false;
    }
    return true;
}

template <typename... Arguments>
bool launch(void (*kernel)(Arguments...), const void* const* arguments, unsigned grid, unsigned block, unsigned cluster,
            size_t shared_bytes) {
    return launch(kernel, arguments, std::index_sequence_for<Arguments...>(), grid, block, cluster, shared_bytes);
}

}  // namespace machine

#define threadIdx (machine::current->index)
#define blockIdx (machine::cta().index)
#define blockDim (machine::block_size)
#define gridDim (machine::grid_size)

using std::max;
using std::min;

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}

inline void __syncthreads() { machine::sync(machine::cta().named[0], machine::block_size.x); }
inline void __syncwarp() { machine::sync_warp(); }

inline int __any_sync(unsigned, bool value) {
    machine::slot(machine::current->lane)[0] = value;
    machine::sync_warp();
    bool any = false;
    for (int lane = 0; lane < machine::kWarp; ++lane) any |= machine::slot(lane)[0] != 0;
    machine::sync_warp();
    return any;
}

template <typename T> T __shfl_sync(unsigned, T value, int lane) {
    static_assert(sizeof(T) == 4);
    std::memcpy(machine::slot(machine::current->lane), &value, 4);
    machine::sync_warp();
    T result;
    std::memcpy(&result, machine::slot(lane), 4);
    machine::sync_warp();
    return result;
}
