// The executor's own view of a launch. Kernels see cuda.h and ptx.h only.
//
// One fiber per CUDA thread, all on the OS thread that launches. A thread runs until it waits; then another one
// that can run is chosen: the lowest, the highest or a random one. Blocks run one after the other, in the same kind
// of order; the blocks of a cluster run together. A thread that has not begun needs no stack of its own, so a
// kernel in which nothing waits runs on one stack.
#ifndef LOWRANK_HOST_EXECUTOR_H
#define LOWRANK_HOST_EXECUTOR_H

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "hopper.h"
#include "ptx.h"

namespace host {
struct Kernel {
    const char *name;
    size_t params_bytes;
    void (*run)(const void *params);
    unsigned threads, blocks; // launch bounds; 0 blocks: not said
};

enum class Order { forward, reversed, random };

struct Random {
    uint64_t state;
    uint64_t next() { // SplitMix64
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    unsigned below(unsigned n) { return (unsigned)((next() >> 32) * n >> 32); }
};

// Pages whose last byte lies before a page that no one may touch. What is in use starts as 0xff (NaN in every float
// type) and ends `slack` bytes before that page, so that it starts aligned; slack and front must stay 0xff.
struct Region {
    unsigned char *pages = nullptr, *begin = nullptr;
    size_t mapped = 0, bytes = 0, slack = 0;

    static Region map(size_t bytes, size_t alignment);
    void unmap();
    unsigned char *end() const { return begin + bytes; }
    void poison();
    // The first byte outside that was written, or null.
    const unsigned char *written_outside() const;
    bool holds(const void *p, size_t n) const {
        return (const unsigned char *)p >= begin && (const unsigned char *)p + n <= end();
    }
};

struct SharedArray {
    const void *key;
    const char *name;
    Region region;
    uint32_t address; // in descriptors; equal to the pointer modulo 1024
    // As TMA and wgmma see it: empty before either has to do with it. Of every 16 bytes the fences at that time.
    std::vector<unsigned char> seen = {};
    std::vector<unsigned> fences = {};
};

struct Stack {
    static constexpr size_t bytes = 128 << 10;
    unsigned char *pages = nullptr, *top = nullptr;
    size_t mapped = 0;

    // Stack number n: neighbours begin at different offsets in their pages, or they would meet in the same cache
    // lines.
    static Stack map(size_t n);
    void unmap();
};

// Operations that are asked for one by one, ended in groups and land group by group.
template <typename T> struct Groups {
    std::vector<T> items;      // in flight, oldest first
    std::vector<size_t> sizes; // of the groups that were ended

    void clear() {
        items.clear();
        sizes.clear();
    }
    void commit() {
        size_t committed = 0;
        for (size_t size : sizes) committed += size;
        sizes.push_back(items.size() - committed);
    }
    // All but the `left` latest groups.
    template <typename Perform> void land(size_t left, Perform perform) {
        size_t landing = 0, groups = 0;
        while (sizes.size() - groups > left) landing += sizes[groups++];
        for (size_t i = 0; i < landing; i++) perform(items[i]);
        items.erase(items.begin(), items.begin() + (ptrdiff_t)landing);
        sizes.erase(sizes.begin(), sizes.begin() + (ptrdiff_t)groups);
    }
};

struct Copy {
    void *to;
    const void *from;
    unsigned bytes, valid_bytes;
};

struct Block;
constexpr unsigned none = ~0u;

struct Lane : ThreadView {
    Block *owner;
    unsigned number; // in the cluster, where every block begins with a multiple of 32
    bool begun, exited;
    void *context;
    Stack stack;
    // What the thread waits for.
    const char *operation;
    Site site;
    const void *object; // for `explain`, which says more about it, or null
    std::string (*explain)(const void *object);
    Groups<Copy> copies;
    Groups<std::function<void()>> stores;
    unsigned cluster_phase; // arrived at, or none
};

// Lanes of a warp on their way into one collective operation.
struct Gathering {
    const char *operation;
    Site site;
    uint32_t mask, arrived;
    void *deposits[32];
};

// A warp's accumulators that wgmmas in flight add to: where they go and their values until then.
struct Accumulators {
    int count;
    float *d[32], values[32][128];
    unsigned in_flight = 0;
};

struct PendingWgmma {
    Wgmma operation;
    uint32_t registers[32][4];
    std::shared_ptr<Accumulators> sums;
};

struct Warp {
    std::vector<Gathering> gatherings;
    Groups<PendingWgmma> wgmmas;
    std::vector<std::shared_ptr<Accumulators>> accumulators;
    unsigned issued = 0; // wgmmas ever
    std::vector<Wgmma> of_group; // of the first warp of a warpgroup: what its warps issued
    bool fenced = false;
    unsigned registers = 0; // of a thread, by setmaxnreg; 0: as launched
};

struct Barrier {
    const char *operation;
    Site site;
    unsigned expected = 0, arrived = 0;
    std::vector<Lane *> waiting;
};

struct Block : BlockView {
    unsigned threads, running; // running: not exited
    Lane *lanes;               // [threads]
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::vector<SharedArray> shared; // the first is the dynamic one
    unsigned fences; // of ordinary writes, before TMA and wgmma
};

struct ClusterBarrier {
    unsigned phase, arrived;
    std::vector<Lane *> waiting;
};

// A TMA copy to shared memory, and who started it.
struct InFlight {
    Lane *lane;
    std::function<void()> land;
};

// A signal inside of a kernel; no address where the processor tells none.
struct Fault {
    const Lane *lane;
    int signal;
    const void *address;
};

// A type of factors: bytes of an element, bits of a fraction, the least exponent of a normal number.
struct CoreType {
    int bytes, fraction, least;
};
constexpr CoreType core_bf16{2, 7, -126}, core_f16{2, 10, -14}, core_tf32{4, 10, -126};

// Eight neighbours of a factor.
struct alignas(32) Eight {
    float x[8];
    int32_t exponent[8], fraction[8], sign[8];
    Eight() = default;
    Eight(const float *values, const CoreType &type);
};
// sums [8] += a [terms] b [terms], 8 or 16 terms, rounded as the chip's tensor cores round.
void add_products(float *sums, const float *a, const Eight *b, int terms, const CoreType &type);

struct Executor {
    const Kernel *kernel;
    const void *params;
    unsigned capability; // of the chip that is acted, times ten
    bool sums_as_chip;   // mma and wgmma round as its tensor cores do, which takes longer; else each product is added by fma
    Order order;
    Random random;
    std::vector<Lane> lanes;     // by number
    std::vector<Block> blocks;   // of the cluster that runs
    std::vector<uint64_t> ready; // a bit per lane that could run
    unsigned ready_count, running_count; // running: not exited
    size_t last_word; // of `ready`, where the last thread was
    ClusterBarrier cluster_barrier;
    std::vector<std::pair<const void *, Lane *>> mbarrier_waiters;
    std::vector<InFlight> in_flight; // oldest first
    std::vector<std::pair<uint64_t *, const Lane *>> unfenced; // mbarriers that only who initialised them knows
    void *main_context = nullptr;
    std::vector<Stack> stacks; // not in use
    size_t stack_count = 0;    // ever made
    std::vector<Region> regions; // not in use
    alignas(32) float wgmma_a[16][16], wgmma_b[16][256]; // what a wgmma multiplies
    Eight wgmma_eights[32][16];
    Fault fault;
    std::string failure;

    void begin(const unsigned block[3], const unsigned grid[3], size_t cluster_blocks);
    void run_cluster(unsigned shared_bytes);
    void end();
    Lane *choose();
    void land(size_t index);
    std::string unfinished() const;
    // Lanes of a warp, by its first one's number.
    void make_ready(unsigned first, uint32_t mask);
    void make_ready(const Lane *lane) { make_ready(lane->number & ~31u, 1u << lane->number % 32); }
    // The running thread waits until something makes it ready.
    void wait(const char *operation, Site site, const void *object = nullptr,
              std::string (*explain)(const void *object) = nullptr);
    void go_to(Lane *next, void **save);
    Lane *exit_lane();
    std::string deadlock();
    SharedArray take_shared(const void *key, const char *name, size_t bytes, size_t alignment);
};

extern thread_local Executor *executor __attribute__((tls_model("initial-exec")));
inline Lane *this_lane() { return static_cast<Lane *>(self); }
Warp &this_warp();
// Fails unless the chip has the operation: Hopper's kernels are for sm_90a alone.
void on_hopper(const char *operation);
// The most shared memory of a block on a chip.
unsigned shared_limit(unsigned capability);
unsigned launched_registers(unsigned threads);
// "name (file:line)"; "kernel K, block (x, y, z), thread t: "; what a fault was.
std::string site_text(const char *operation, Site site);
std::string thread_text(const Lane &lane);
std::string fault_text(const Fault &fault);
// The shared array that holds these bytes; else the kernel fails.
void check_shared(const char *operation, const void *p, size_t bytes, size_t alignment);
// The bytes at a descriptor's address.
const void *shared_at(uint32_t address, size_t bytes);
// TMA has written these bytes, in any block of the cluster. TMA or wgmma reads them in this one: fails if they differ from
// what it has seen and no thread has fenced ordinary writes since.
void async_written(const void *p, size_t bytes);
void async_read(const char *operation, const void *p, size_t bytes);
// What a failing access was probably meant for: the nearest allocation or shared array.
std::string describe_address(const void *address);
std::string describe_shared(const SharedArray &array, const void *address);
// A write outside of an allocation that a pointer in these parameters names, or "".
std::string written_outside_allocations(const void *params, size_t params_bytes);
} // namespace host

#endif
