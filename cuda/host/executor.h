// The executor's own view of a launch. Kernels see cuda.h and ptx.h only.
//
// One fiber per CUDA thread, all on the OS thread that launches. A thread runs until it waits; then another one that
// can run is chosen: the lowest, the highest or a random one. Blocks run one after the other, in the same kind of order;
// the blocks of a cluster run together. A thread that has not begun needs no stack of its own, so a kernel in which
// nothing waits runs on one stack.
#ifndef LOWRANK_HOST_EXECUTOR_H
#define LOWRANK_HOST_EXECUTOR_H

#include <memory>
#include <string>
#include <vector>

#include "ptx.h"

namespace host {
struct Kernel {
    const char *name;
    size_t params_bytes;
    void (*run)(const void *params);
    unsigned threads;
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
};

struct Stack {
    static constexpr size_t bytes = 128 << 10;
    unsigned char *pages = nullptr;
    size_t mapped = 0;

    static Stack map();
    unsigned char *top() const;
    void unmap();
};

struct Copy {
    void *to;
    const void *from;
    unsigned bytes, valid_bytes;
};

enum class State : uint8_t { ready, waiting, exited };

struct Block;

struct Lane : ThreadView {
    Block *owner;
    unsigned number; // in the cluster
    State state;
    bool begun;
    void *context;
    Stack stack;
    // What the thread waits for.
    const char *operation;
    Site site;
    const void *object; // for `explain`, which says more about it, or null
    std::string (*explain)(const void *object);
    std::vector<Copy> copies;   // in flight, oldest first
    std::vector<size_t> groups; // the sizes of the committed groups in flight
};

// Lanes of a warp on their way into one collective operation.
struct Gathering {
    const char *operation;
    Site site;
    uint32_t mask, arrived;
    void *deposits[32];
};

struct Barrier {
    const char *operation;
    Site site;
    unsigned expected = 0, arrived = 0;
    std::vector<Lane *> waiting;
};

struct Block : BlockView {
    unsigned threads;
    Lane *lanes; // [threads]
    std::vector<std::vector<Gathering>> warps;
    Barrier barriers[16];
    std::vector<SharedArray> shared; // the first is the dynamic one
};

// A signal inside of a kernel; no address where the processor tells none.
struct Fault {
    const Lane *lane;
    int signal;
    const void *address;
};

struct Executor {
    const Kernel *kernel;
    const void *params;
    Order order;
    Random random;
    std::vector<Lane> lanes;
    std::vector<Block> blocks;  // of the cluster that runs
    std::vector<uint64_t> ready; // a bit per lane
    unsigned ready_count, exited_count;
    size_t last_word; // of `ready`, where the last thread was
    void *main_context = nullptr;
    std::vector<Stack> stacks;
    std::vector<Region> regions; // not in use
    Fault fault;
    std::string failure;

    void begin(const unsigned block[3], const unsigned grid[3], size_t cluster_blocks);
    void run_cluster(unsigned shared_bytes);
    void end();
    Lane *choose();
    void make_ready(Lane *lane);
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
// The shared array that holds these bytes; else the kernel fails.
void check_shared(const char *operation, const void *p, size_t bytes, size_t alignment);
// What a failing access was probably meant for: the nearest allocation or shared array.
std::string describe_address(const void *address);
std::string describe_shared(const SharedArray &array, const void *address);
// A write outside of an allocation that a pointer in these parameters names, or "".
std::string written_outside_allocations(const void *params, size_t params_bytes);
} // namespace host

#endif
