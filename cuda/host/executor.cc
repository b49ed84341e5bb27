// Runs kernels on the host: the scheduler, barriers, launches and the C interface. See executor.h.
#include "executor.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>

#include <algorithm>
#include <map>
#include <mutex>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace host {
thread_local ThreadView *self;
thread_local Executor *executor;

static std::vector<Kernel> &kernels() {
    static auto *all = new std::vector<Kernel>;
    return *all;
}

Registration::Registration(const char *name, size_t params_bytes, void (*run)(const void *), unsigned threads, unsigned) {
    kernels().push_back(Kernel{name, params_bytes, run, threads});
}

// ---- Contexts ----

#ifdef __x86_64__
// Pushes what a called function must keep, leaves the stack pointer in *save and goes on where `to` was left.
extern "C" void lowrank_switch(void **save, void *to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden lowrank_switch
.globl lowrank_switch
.type lowrank_switch, @function
lowrank_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size lowrank_switch, .-lowrank_switch
)");
static void *new_context(const Stack &stack, void (*entry)()) {
    // The six registers, the address to return to, and a place for that function's own caller.
    void **top = (void **)stack.top - 8;
    memset(top, 0, 8 * sizeof(void *));
    top[6] = (void *)entry;
    return top;
}
#else
static void lowrank_switch(void **save, void *to) {
    ucontext_t here; // on the stack that is left, so it lives until someone comes back
    *save = &here;
    swapcontext(&here, (ucontext_t *)to);
}
static void *new_context(const Stack &stack, void (*entry)()) {
    auto *context = (ucontext_t *)(((uintptr_t)stack.top - sizeof(ucontext_t)) & ~(uintptr_t)63);
    getcontext(context);
    context->uc_stack.ss_sp = stack.pages;
    context->uc_stack.ss_size = (size_t)((unsigned char *)context - stack.pages);
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}
#endif

static void fiber_main() {
    for (;;) {
        executor->kernel->run(executor->params);
        Lane *done = this_lane(), *next = executor->exit_lane();
        if (next != nullptr && !next->begun) { // on this stack
            std::swap(next->stack, done->stack);
            next->begun = true;
            self = next;
            continue;
        }
        executor->stacks.push_back(done->stack);
        done->stack = Stack();
        executor->go_to(next, &done->context);
    }
}

// ---- The scheduler ----

void Executor::make_ready(unsigned first, uint32_t mask) {
    ready[first / 64] |= (uint64_t)mask << first % 64;
    ready_count += (unsigned)__builtin_popcount(mask);
}

Lane *Executor::choose() {
    bool any = order == Order::random;
    // Copies land when no thread can go on, in an order that is also legal; in random order at any time.
    while (!in_flight.empty() && (ready_count == 0 || (any && random.below(16) == 0)))
        land(any ? random.below((unsigned)in_flight.size()) : order == Order::forward ? 0 : in_flight.size() - 1);
    if (ready_count == 0) return nullptr;
    size_t word, words = ready.size();
    int bit;
    if (order == Order::forward) {
        for (word = 0; ready[word] == 0;) word++;
        bit = __builtin_ctzll(ready[word]);
    } else if (order == Order::reversed) {
        for (word = words - 1; ready[word] == 0;) word--;
        bit = 63 - __builtin_clzll(ready[word]);
    } else {
        // Mostly a lane of the same warps, so that these run ahead of the others, which shows missing barriers.
        uint64_t r = random.next();
        word = r % 32 == 0 || ready[last_word] == 0 ? (r >> 32) % words : last_word;
        while (ready[word] == 0) word = (word + 1) % words;
        unsigned turn = r >> 8 & 63;
        uint64_t turned = turn == 0 ? ready[word] : ready[word] >> turn | ready[word] << (64 - turn);
        bit = (int)((unsigned)__builtin_ctzll(turned) + turn) & 63;
        last_word = word;
    }
    ready[word] &= ~((uint64_t)1 << bit);
    ready_count--;
    return &lanes[word * 64 + (size_t)bit];
}

// Runs `next`, or main where it is null; comes back when someone goes to *save.
void Executor::go_to(Lane *next, void **save) {
    self = next;
    if (next == nullptr) return lowrank_switch(save, main_context);
    if (!next->begun) {
        next->begun = true;
        if (stacks.empty()) stacks.push_back(Stack::map(stack_count++));
        next->stack = stacks.back();
        stacks.pop_back();
        if (next->stack.pages == nullptr) {
            failure = "no memory is left for the stacks of the block's threads";
            self = nullptr;
            return lowrank_switch(save, main_context);
        }
        next->context = new_context(next->stack, fiber_main);
    }
    lowrank_switch(save, next->context);
}

void Executor::wait(const char *operation, Site site, const void *object, std::string (*explain)(const void *)) {
    Lane *lane = this_lane();
    lane->operation = operation;
    lane->site = site;
    lane->object = object;
    lane->explain = explain;
    Lane *next = choose();
    if (next == lane) return;
    if (next == nullptr) failure = deadlock();
    go_to(next, &lane->context);
}

Lane *Executor::exit_lane() {
    this_lane()->exited = true;
    this_lane()->owner->running--;
    running_count--;
    Lane *next = choose();
    if (next == nullptr && running_count > 0) failure = deadlock();
    return next;
}

static std::string block_text(const uint3 &index) {
    char text[64];
    snprintf(text, sizeof text, "block (%u, %u, %u)", index.x, index.y, index.z);
    return text;
}

static std::string site_text(const char *operation, Site site) {
    const char *slash = strrchr(site.file, '/');
    return std::string(operation) + " (" + (slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

static unsigned index_in_block(const Lane &lane) { return (unsigned)(&lane - lane.owner->lanes); }

// "threads 0..31, 40" of ascending numbers.
static std::string threads_text(const std::vector<unsigned> &threads) {
    std::string text = threads.size() == 1 ? "thread " : "threads ";
    for (size_t i = 0, j; i < threads.size(); i = j) {
        for (j = i + 1; j < threads.size() && threads[j] == threads[j - 1] + 1;) j++;
        text += (i == 0 ? "" : ", ") + std::to_string(threads[i]);
        if (j > i + 1) text += ".." + std::to_string(threads[j - 1]);
    }
    return text;
}

// "threads 0..31 wait at ...; threads 32..63 have exited" for the block.
static std::string states_text(const Block &block) {
    std::vector<std::pair<std::string, std::vector<unsigned>>> states;
    for (unsigned t = 0; t < block.threads; t++) {
        const Lane &lane = block.lanes[t];
        std::string state = "have exited";
        if (!lane.exited) {
            state = "wait at " + site_text(lane.operation, lane.site);
            if (lane.explain != nullptr) state += ", " + lane.explain(lane.object);
        }
        auto found = std::find_if(states.begin(), states.end(), [&](auto &s) { return s.first == state; });
        if (found == states.end()) states.push_back({state, {t}});
        else found->second.push_back(t);
    }
    std::string text;
    for (auto &[state, threads] : states) text += (text.empty() ? "" : "; ") + threads_text(threads) + " " + state;
    return text;
}

static std::string thread_text(const Lane &lane) {
    return std::string("kernel ") + executor->kernel->name + ", " + block_text(lane.block->index) + ", thread " +
        std::to_string(index_in_block(lane)) + ": ";
}

// What threads have left behind that they had to wait for or to do together.
std::string Executor::unfinished() const {
    if (!in_flight.empty()) return thread_text(*in_flight[0].lane) + "a copy to shared memory that no one waited for";
    for (const Block &block : blocks) {
        for (unsigned t = 0; t < block.threads; t++)
            if (!block.lanes[t].stores.items.empty()) return thread_text(block.lanes[t]) + "exited before tma_store_wait<0>()";
        for (size_t w = 0; w < block.warps.size(); w++) {
            const Warp &warp = block.warps[w], &first = block.warps[w & ~(size_t)3];
            const Lane &lane = block.lanes[w * 32];
            if (!warp.wgmmas.items.empty()) return thread_text(lane) + "exited before wgmma_wait<0>()";
            if (warp.issued != first.issued)
                return thread_text(lane) + "its warp did " + std::to_string(warp.issued) +
                    " wgmmas, the first one of its warpgroup " + std::to_string(first.issued);
        }
    }
    return "";
}

std::string Executor::deadlock() {
    std::string text = std::string("kernel ") + kernel->name + ": deadlock";
    for (const Block &block : blocks) text += ", " + block_text(block.index) + ": " + states_text(block);
    return text;
}

void fail(const char *format, ...) {
    char what[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    Lane *lane = this_lane();
    executor->failure = thread_text(*lane) + what;
    executor->go_to(nullptr, &lane->context);
    __builtin_unreachable();
}

// ---- Barriers and collective operations ----

static std::string barrier_text(const void *object) {
    auto *barrier = (const Barrier *)object;
    return "where " + std::to_string(barrier->arrived) + " of " + std::to_string(barrier->expected) + " threads have arrived";
}

void barrier(const char *operation, unsigned id, unsigned threads, bool wait, Site site) {
    Lane *lane = this_lane();
    Block &block = *lane->owner;
    if (id >= 16) fail("%s: there is no barrier %u, only 0 to 15", operation, id);
    if (threads % 32 != 0) fail("%s: %u threads are not whole warps", operation, threads);
    if (threads == 0) threads = block.threads;
    if (threads > block.threads) fail("%s: %u threads are expected, the block has %u", operation, threads, block.threads);
    Barrier &barrier = block.barriers[id];
    if (barrier.arrived == 0) {
        barrier.expected = threads;
        barrier.operation = operation;
        barrier.site = site;
    } else if (barrier.expected != threads) {
        fail("%s: %u threads are expected, but %u by those who came to barrier %u before, at %s", operation, threads,
             barrier.expected, id, site_text(barrier.operation, barrier.site).c_str());
    } else if (id == 0 && barrier.site.line != site.line) {
        fail("divergent barrier: this thread is at %s, %u others at %s", site_text(operation, site).c_str(),
             barrier.arrived, site_text(barrier.operation, barrier.site).c_str());
    }
    if (++barrier.arrived < barrier.expected) {
        if (!wait) return;
        barrier.waiting.push_back(lane);
        return executor->wait(operation, site, &barrier, barrier_text);
    }
    barrier.arrived = 0;
    for (Lane *other : barrier.waiting) executor->make_ready(other);
    barrier.waiting.clear();
    if (!wait) return;
    // Those who waited have the same right to go first.
    executor->make_ready(lane);
    executor->wait(operation, site);
}

void collective(const char *operation, uint32_t mask, void *deposit, Compute compute, Site site) {
    Lane *lane = this_lane();
    Block &block = *lane->owner;
    unsigned first = index_in_block(*lane) & ~31u, exist = std::min(32u, block.threads - first);
    if (!(mask >> lane->lane & 1)) fail("%s: lane %u is not in its own mask %08x", operation, lane->lane, mask);
    mask &= exist == 32 ? 0xffffffffu : (1u << exist) - 1;
    auto &gatherings = block.warps[first / 32].gatherings;
    size_t at = 0;
    while (at < gatherings.size() && gatherings[at].mask != mask) at++;
    if (at == gatherings.size()) {
        gatherings.emplace_back();
        gatherings[at].mask = mask;
    }
    Gathering &gathering = gatherings[at];
    if (gathering.arrived == 0) {
        gathering.operation = operation;
        gathering.site = site;
        memset(gathering.deposits, 0, sizeof gathering.deposits);
    } else if (gathering.operation != operation || gathering.site.line != site.line) {
        fail("divergent warp: this thread is at %s, lanes %08x at %s", site_text(operation, site).c_str(),
             gathering.arrived, site_text(gathering.operation, gathering.site).c_str());
    }
    gathering.arrived |= 1u << lane->lane;
    gathering.deposits[lane->lane] = deposit;
    if (gathering.arrived != mask) return executor->wait(operation, site);
    gathering.arrived = 0;
    if (compute != nullptr) compute(mask, gathering.deposits);
    executor->make_ready(block.lanes[first].number, mask & ~(1u << lane->lane));
}

// ---- Shared memory ----

void *shared(const void *key, const char *name, size_t bytes) {
    Block &block = *this_lane()->owner;
    for (const SharedArray &array : block.shared)
        if (array.key == key) return array.region.begin;
    block.shared.push_back(executor->take_shared(key, name, bytes, 16));
    const SharedArray &before = block.shared[block.shared.size() - 2];
    uint32_t next = (before.address + (uint32_t)before.region.bytes + 1023) & ~1023u;
    block.shared.back().address = next + (uint32_t)((uintptr_t)block.shared.back().region.begin % 1024);
    if (block.shared.back().address + bytes > 1 << 18) fail("more than 227 KB of shared memory, with %s", name);
    return block.shared.back().region.begin;
}

unsigned char *dynamic_shared() { return this_lane()->owner->shared[0].region.begin; }

SharedArray Executor::take_shared(const void *key, const char *name, size_t bytes, size_t alignment) {
    SharedArray array{key, name, Region(), 0};
    auto fits = [&](const Region &r) { return r.bytes == bytes && (uintptr_t)r.begin % alignment == 0; };
    auto found = std::find_if(regions.begin(), regions.end(), fits);
    if (found != regions.end()) {
        array.region = *found;
        *found = regions.back();
        regions.pop_back();
    } else {
        array.region = Region::map(bytes, alignment);
        if (array.region.pages == nullptr) fail("no memory is left for %zu bytes of shared memory", bytes);
    }
    array.region.poison();
    return array;
}

// ---- Launches ----

static std::string fault_text(const Fault &fault);

// Prepares for blocks of one shape.
void Executor::begin(const unsigned block_dim[3], const unsigned grid[3], size_t cluster_blocks) {
    unsigned threads = block_dim[0] * block_dim[1] * block_dim[2], padded = (threads + 31) & ~31u;
    blocks.resize(cluster_blocks);
    lanes.resize(cluster_blocks * padded);
    ready.assign((lanes.size() + 63) / 64, 0);
    for (size_t b = 0; b < blocks.size(); b++) {
        Block &block = blocks[b];
        block.dim = dim3{block_dim[0], block_dim[1], block_dim[2]};
        block.grid = dim3{grid[0], grid[1], grid[2]};
        block.threads = threads;
        block.lanes = &lanes[b * padded];
        block.warps.assign((threads + 31) / 32, {});
        for (unsigned t = 0; t < threads; t++) {
            Lane &lane = block.lanes[t];
            lane.index = uint3{t % block_dim[0], t / block_dim[0] % block_dim[1], t / block_dim[0] / block_dim[1]};
            lane.lane = t % 32;
            lane.block = &block;
            lane.owner = &block;
            lane.number = (unsigned)(b * padded + t);
        }
    }
}

// Runs the blocks, whose indices are set, to their end or to a failure.
void Executor::run_cluster(unsigned shared_bytes) {
    cluster_barrier.phase = cluster_barrier.arrived = 0;
    cluster_barrier.waiting.clear();
    mbarrier_waiters.clear();
    in_flight.clear();
    ready_count = running_count = 0;
    last_word = 0;
    for (Block &block : blocks) {
        for (Barrier &barrier : block.barriers) {
            barrier.arrived = 0;
            barrier.waiting.clear();
        }
        for (auto &warp : block.warps) warp = Warp();
        block.running = block.threads;
        block.shared.push_back(take_shared(nullptr, "DYNAMIC_SHARED", shared_bytes, 1024));
        for (unsigned t = 0; t < block.threads; t++) {
            Lane &lane = block.lanes[t];
            lane.begun = lane.exited = false;
            lane.operation = nullptr;
            lane.copies.clear();
            lane.stores.clear();
            lane.cluster_phase = none;
            make_ready(&lane);
            running_count++;
        }
    }
    executor = this;
    fault.signal = 0;
    go_to(choose(), &main_context);
    if (fault.signal != 0) failure = fault_text(fault);
    if (failure.empty()) failure = unfinished();
    executor = nullptr;
    for (Lane &lane : lanes) {
        if (lane.stack.pages != nullptr) stacks.push_back(lane.stack);
        lane.stack = Stack();
    }
    std::fill(ready.begin(), ready.end(), 0);
    for (Block &block : blocks) {
        for (SharedArray &array : block.shared) {
            if (failure.empty() && array.region.written_outside() != nullptr)
                failure = std::string("kernel ") + kernel->name + ", " + block_text(block.index) + ": wrote " +
                    describe_shared(array, array.region.written_outside());
            regions.push_back(array.region);
        }
        block.shared.clear();
    }
}

// Gives back what would only pile up.
void Executor::end() {
    while (regions.size() > 64) {
        regions.back().unmap();
        regions.pop_back();
    }
    blocks.clear();
    lanes.clear();
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

static std::string fault_text(const Fault &fault) {
    std::string what = "access to an address that is misaligned or none at all";
    if (fault.signal == SIGFPE) what = "integer division by zero";
    else if (fault.address != nullptr) {
        char address[32];
        snprintf(address, sizeof address, "%p", fault.address);
        what = std::string("access to ") + address + ", " + describe_address(fault.address);
    }
    const Lane &lane = *fault.lane;
    return thread_text(lane) + what + (lane.operation == nullptr ? "" : ", after " + site_text(lane.operation, lane.site));
}

static void install_handlers() {
    static std::once_flag once;
    std::call_once(once, [] {
        for (int signal : {SIGSEGV, SIGBUS, SIGFPE}) {
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

// Executors that no launch uses; each has its stacks and shared memory.
static std::mutex idle_mutex;
static std::vector<Executor *> idle;

static Executor *take_executor() {
    std::lock_guard<std::mutex> lock(idle_mutex);
    if (idle.empty()) return new Executor();
    Executor *taken = idle.back();
    idle.pop_back();
    return taken;
}

static std::string check_launch(const Kernel *kernel, const unsigned grid[3], const unsigned block[3],
                                unsigned shared_bytes, size_t params_bytes, int order) {
    char text[256] = "";
    uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    if (params_bytes != kernel->params_bytes)
        snprintf(text, sizeof text, "its parameters have %zu bytes, found %zu", kernel->params_bytes, params_bytes);
    else if (threads == 0 || threads > kernel->threads || threads > 1024 || block[2] > 64)
        snprintf(text, sizeof text, "it takes blocks of 1 to %u threads, found %u x %u x %u", kernel->threads, block[0], block[1], block[2]);
    else if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffff || grid[1] > 65535 || grid[2] > 65535)
        snprintf(text, sizeof text, "no device takes a grid of %u x %u x %u blocks", grid[0], grid[1], grid[2]);
    else if (shared_bytes > 227 << 10)
        snprintf(text, sizeof text, "a block has at most 227 KB of shared memory, found %u bytes", shared_bytes);
    else if (order < 0 || order > 2)
        snprintf(text, sizeof text, "the order of threads is 0 (forward), 1 (reversed) or 2 (random), found %d", order);
    return text[0] == 0 ? "" : std::string("kernel ") + kernel->name + ": " + text;
}

struct Shape {
    const unsigned *grid, *cluster, *block;
    unsigned shared_bytes;
};

struct alignas(128) ParamsChunk {
    char bytes[128];
};

static std::string launch(const Kernel *kernel, const Shape &shape, const void *params, size_t params_bytes, int order,
                          uint64_t seed) {
    const unsigned *grid = shape.grid, *cluster = shape.cluster;
    std::string wrong = check_launch(kernel, grid, shape.block, shape.shared_bytes, params_bytes, order);
    uint64_t blocks = (uint64_t)cluster[0] * cluster[1] * cluster[2];
    if (wrong.empty() && (blocks == 0 || blocks > 16 || grid[0] % cluster[0] || grid[1] % cluster[1] || grid[2] % cluster[2]))
        wrong = std::string("kernel ") + kernel->name + ": the grid is not made of clusters of 1 to 16 blocks";
    if (!wrong.empty()) return wrong;
    install_handlers();
    Executor *e = take_executor();
    std::vector<ParamsChunk> aligned(params_bytes / sizeof(ParamsChunk) + 1);
    memcpy((void *)aligned.data(), params, params_bytes);
    e->kernel = kernel;
    e->params = aligned.data();
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
            e->blocks[rank].index = uint3{x * cluster[0] + rank % cluster[0], y * cluster[1] + rank / cluster[0] % cluster[1],
                                          z * cluster[2] + rank / cluster[0] / cluster[1]};
        e->run_cluster(shape.shared_bytes);
    }
    e->end();
    std::string failure = e->failure;
    {
        std::lock_guard<std::mutex> lock(idle_mutex);
        idle.push_back(e);
    }
    std::string outside = written_outside_allocations(params, params_bytes);
    if (failure.empty() && !outside.empty()) failure = std::string("kernel ") + kernel->name + ": " + outside;
    return failure;
}
} // namespace host

#define INTERFACE extern "C" __attribute__((visibility("default")))

// lowrank_host_launch for a kernel whose blocks run in clusters.
INTERFACE int lowrank_host_launch_cluster(const char *name, const unsigned grid[3], const unsigned cluster[3],
                                          const unsigned block[3], unsigned shared_bytes, const void *params,
                                          size_t params_bytes, int order, uint64_t seed, char *message,
                                          size_t message_bytes) {
    const auto &all = host::kernels();
    auto found = std::find_if(all.begin(), all.end(), [&](const host::Kernel &k) { return strcmp(k.name, name) == 0; });
    std::string wrong = found == all.end()
        ? std::string("there is no kernel ") + name
        : host::launch(&*found, {grid, cluster, block, shared_bytes}, params, params_bytes, order, seed);
    if (message_bytes > 0) snprintf(message, message_bytes, "%s", wrong.c_str());
    return wrong.empty() ? 0 : 1;
}

// Runs a kernel to its end. 0: done; 1: `message` says what is wrong. `order` of threads: 0 forward, 1 reversed,
// 2 random by `seed`.
INTERFACE int lowrank_host_launch(const char *name, const unsigned grid[3], const unsigned block[3],
                                  unsigned shared_bytes, const void *params, size_t params_bytes, int order,
                                  uint64_t seed, char *message, size_t message_bytes) {
    const unsigned alone[3] = {1, 1, 1};
    return lowrank_host_launch_cluster(name, grid, alone, block, shared_bytes, params, params_bytes, order, seed, message,
                                       message_bytes);
}

// The kernel at an index: the bytes of its parameters, 0 past the last.
INTERFACE size_t lowrank_host_kernel(size_t index, const char **name) {
    const auto &all = host::kernels();
    if (index >= all.size()) return 0;
    *name = all[index].name;
    return all[index].params_bytes;
}
