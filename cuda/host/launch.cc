// Launches: their checks, faults that become messages, and the C interface.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <mutex>

#include "executor.h"

namespace host {
static std::vector<Kernel> &kernels() {
    static auto *all = new std::vector<Kernel>;
    return *all;
}

Registration::Registration(const char *name, size_t params_bytes, void (*run)(const void *), unsigned threads,
                           unsigned blocks) {
    kernels().push_back(Kernel{name, params_bytes, run, threads, blocks});
}

// CUDA's programming guide, "Technical Specifications per Compute Capability".
unsigned shared_limit(unsigned capability) {
    if (capability == 80 || capability == 87) return 163 << 10;
    return capability < 90 || capability >= 120 ? 99 << 10 : 227 << 10;
}

// ---- Faults inside a kernel become failures ----

static struct sigaction previous_actions[65];

static void on_fault(int signal, siginfo_t *info, void *context) {
    if (self == nullptr) { // not ours
        const struct sigaction &previous = previous_actions[signal];
        if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
        if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(signal);
        sigaction(signal, &previous, nullptr);
        return;
    }
    // The signal's stack is small: what happened is told by run_cluster.
    Lane *lane = this_lane();
    executor->fault = Fault{lane, signal, info->si_code == SI_KERNEL ? nullptr : info->si_addr};
    executor->go_to(nullptr, &lane->context);
}

std::string fault_text(const Fault &fault) {
    std::string what = "access to an address that is misaligned or none at all"; // SIGILL: by a check of the compiler
    if (fault.signal == SIGFPE) what = "integer division by zero";
    else if (fault.signal != SIGILL && fault.address != nullptr) {
        char address[32];
        snprintf(address, sizeof address, "%p", fault.address);
        what = std::string("access to ") + address + ", " + describe_address(fault.address);
    }
    const Lane &lane = *fault.lane;
    return thread_text(lane) + what +
           (lane.operation == nullptr ? "" : ", after " + site_text(lane.operation, lane.site));
}

static void install_handlers() {
    static std::once_flag once;
    std::call_once(once, [] {
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
            struct sigaction action = {};
            action.sa_sigaction = on_fault;
            // NODEFER: the handler is left by a switch, so nothing would unblock the signal.
            action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
            sigaction(signal, &action, &previous_actions[signal]);
        }
    });
    // The handler needs a stack of its own where a thread's stack has overflowed.
    stack_t alternate;
    if (sigaltstack(nullptr, &alternate) == 0 && alternate.ss_flags & SS_DISABLE) {
        alternate = {};
        alternate.ss_sp = new char[64 << 10]; // for as long as the thread lives, and no one says when it ends
        alternate.ss_size = 64 << 10;
        sigaltstack(&alternate, nullptr);
    }
}

// Executors that no launch uses; each has its stacks and shared memory, which a library that is closed gives back.
static struct Idle {
    std::mutex mutex;
    std::vector<Executor *> executors;

    ~Idle() {
        for (Executor *e : executors) {
            for (Stack &stack : e->stacks) stack.unmap();
            for (Region &region : e->regions) region.unmap();
            delete e;
        }
    }
} idle;

static Executor *take_executor() {
    std::lock_guard<std::mutex> lock(idle.mutex);
    if (idle.executors.empty()) return new Executor();
    Executor *taken = idle.executors.back();
    idle.executors.pop_back();
    return taken;
}

static std::string check_launch(const Kernel *kernel, const unsigned grid[3], const unsigned block[3],
                                unsigned shared_bytes, unsigned capability, size_t params_bytes, int order) {
    char text[256] = "";
    uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    if (params_bytes != kernel->params_bytes)
        snprintf(text, sizeof text, "its parameters have %zu bytes, found %zu", kernel->params_bytes, params_bytes);
    else if (threads == 0 || threads > kernel->threads || threads > 1024 || block[2] > 64)
        snprintf(text, sizeof text, "it takes blocks of 1 to %u threads, found %u x %u x %u", kernel->threads,
                 block[0], block[1], block[2]);
    else if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffff || grid[1] > 65535 ||
             grid[2] > 65535)
        snprintf(text, sizeof text, "no device takes a grid of %u x %u x %u blocks", grid[0], grid[1], grid[2]);
    else if (shared_bytes > shared_limit(capability))
        snprintf(text, sizeof text, "a block of sm_%u has at most %u bytes of shared memory, found %u", capability,
                 shared_limit(capability), shared_bytes);
    else if (order < 0 || order > 2)
        snprintf(text, sizeof text, "the order of threads is 0 (forward), 1 (reversed) or 2 (random), found %d",
                 order);
    return text[0] == 0 ? "" : std::string("kernel ") + kernel->name + ": " + text;
}

struct Shape {
    const unsigned *grid, *cluster, *block;
    unsigned shared_bytes, capability;
};

static bool sums_as_chip() {
#ifdef LOWRANK_SUMS_AS_CHIP
    return true;
#else
    static const char *sums = getenv("LOWRANK_HOST_SUMS");
    return sums != nullptr && strcmp(sums, "chip") == 0;
#endif
}

struct alignas(128) ParamsChunk {
    char bytes[128];
};

static std::string launch(const Kernel *kernel, const Shape &shape, const void *params, size_t params_bytes,
                          int order, uint64_t seed) {
    const unsigned *grid = shape.grid, *cluster = shape.cluster;
    std::string wrong = check_launch(kernel, grid, shape.block, shape.shared_bytes, shape.capability, params_bytes, order);
    uint64_t blocks = (uint64_t)cluster[0] * cluster[1] * cluster[2];
    if (wrong.empty() &&
        (blocks == 0 || blocks > 16 || grid[0] % cluster[0] || grid[1] % cluster[1] || grid[2] % cluster[2]))
        wrong = std::string("kernel ") + kernel->name + ": the grid is not made of clusters of 1 to 16 blocks";
    if (wrong.empty() && blocks > 1 && shape.capability != 90)
        wrong = std::string("kernel ") + kernel->name + ": only kernels for sm_90a have clusters";
    if (!wrong.empty()) return wrong;
    install_handlers();
    Executor *e = take_executor();
    std::vector<ParamsChunk> aligned(params_bytes / sizeof(ParamsChunk) + 1);
    memcpy((void *)aligned.data(), params, params_bytes);
    e->kernel = kernel;
    e->params = aligned.data();
    e->capability = shape.capability;
    e->sums_as_chip = sums_as_chip();
    e->order = (Order)order;
    e->random = Random{seed};
    e->failure.clear();
    e->begin(shape.block, grid, blocks);
    unsigned clusters[3] = {grid[0] / cluster[0], grid[1] / cluster[1], grid[2] / cluster[2]};
    uint64_t count = (uint64_t)clusters[0] * clusters[1] * clusters[2];
    std::vector<uint64_t> rest; // in random order
    for (uint64_t i = 0; i < count && e->order == Order::random; i++) rest.push_back(i);
    for (uint64_t i = 0; i < count && e->failure.empty(); i++) {
        uint64_t index = e->order == Order::reversed ? count - 1 - i : i;
        if (e->order == Order::random) {
            std::swap(rest[e->random.below((unsigned)rest.size())], rest.back());
            index = rest.back();
            rest.pop_back();
        }
        auto x = (unsigned)(index % clusters[0]), y = (unsigned)(index / clusters[0] % clusters[1]);
        auto z = (unsigned)(index / clusters[0] / clusters[1]);
        for (unsigned rank = 0; rank < blocks; rank++)
            e->blocks[rank].index =
                uint3{x * cluster[0] + rank % cluster[0], y * cluster[1] + rank / cluster[0] % cluster[1],
                      z * cluster[2] + rank / cluster[0] / cluster[1]};
        e->run_cluster(shape.shared_bytes);
    }
    e->end();
    std::string failure = e->failure;
    {
        std::lock_guard<std::mutex> lock(idle.mutex);
        idle.executors.push_back(e);
    }
    std::string outside = written_outside_allocations(params, params_bytes);
    if (failure.empty() && !outside.empty()) failure = std::string("kernel ") + kernel->name + ": " + outside;
    return failure;
}
} // namespace host

#define INTERFACE extern "C" __attribute__((visibility("default")))

// Runs a kernel to its end, on a chip of a compute capability (times ten), its blocks in clusters. 0: done; 1: `message` says
// what is wrong. `order` of threads: 0 forward, 1 reversed, 2 random by `seed`.
INTERFACE int lowrank_host_launch_cluster(const char *name, const unsigned grid[3], const unsigned cluster[3],
                                          const unsigned block[3], unsigned shared_bytes, unsigned capability,
                                          const void *params, size_t params_bytes, int order, uint64_t seed,
                                          char *message, size_t message_bytes) {
    const auto &all = host::kernels();
    auto found =
        std::find_if(all.begin(), all.end(), [&](const host::Kernel &k) { return strcmp(k.name, name) == 0; });
    std::string wrong = found == all.end()
        ? std::string("there is no kernel ") + name
        : host::launch(&*found, {grid, cluster, block, shared_bytes, capability}, params, params_bytes, order, seed);
    if (message_bytes > 0) snprintf(message, message_bytes, "%s", wrong.c_str());
    return wrong.empty() ? 0 : 1;
}

INTERFACE unsigned lowrank_host_shared_limit(unsigned capability) { return host::shared_limit(capability); }

// The kernel at an index: the bytes of its parameters, 0 past the last.
INTERFACE size_t lowrank_host_kernel(size_t index, const char **name) {
    const auto &all = host::kernels();
    if (index >= all.size()) return 0;
    *name = all[index].name;
    return all[index].params_bytes;
}
