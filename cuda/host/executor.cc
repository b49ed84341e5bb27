// The scheduler, barriers, what warps do together, shared memory. See executor.h.
#include "executor.h"

#include <stdarg.h>
#include <stdio.h>

#include <algorithm>

// Other processors switch by the C library; LOWRANK_UCONTEXT chooses that everywhere.
#ifndef __x86_64__
#define LOWRANK_UCONTEXT
#endif
#ifdef LOWRANK_UCONTEXT
#include <ucontext.h>
#endif

namespace host {
thread_local ThreadView *self;
thread_local Executor *executor;

// ---- Contexts ----

#ifndef LOWRANK_UCONTEXT
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

std::string site_text(const char *operation, Site site) {
    const char *slash = strrchr(site.file, '/');
    return std::string(operation) + " (" + (slash != nullptr ? slash + 1 : site.file) + ":" +
           std::to_string(site.line) + ")";
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

std::string thread_text(const Lane &lane) {
    return std::string("kernel ") + executor->kernel->name + ", " + block_text(lane.block->index) + ", thread " +
        std::to_string(index_in_block(lane)) + ": ";
}

// Registers of a thread at a kernel's start, where one block has the multiprocessor: whole eights.
unsigned launched_registers(unsigned threads) { return std::min(65536 / ((threads + 31) & ~31u), 256u) & ~7u; }

// What threads have left behind that they had to wait for or to do together.
std::string Executor::unfinished() const {
    if (!in_flight.empty()) return thread_text(*in_flight[0].lane) + "a copy to shared memory that no one waited for";
    for (const Block &block : blocks) {
        for (unsigned t = 0; t < block.threads; t++)
            if (!block.lanes[t].stores.items.empty())
                return thread_text(block.lanes[t]) + "exited before tma_store_wait<0>()";
        for (size_t w = 0; w < block.warps.size(); w++) {
            const Warp &warp = block.warps[w], &first = block.warps[w & ~(size_t)3];
            const Lane &lane = block.lanes[w * 32];
            if (!warp.wgmmas.items.empty()) return thread_text(lane) + "exited before wgmma_wait<0>()";
            if (warp.issued != first.issued)
                return thread_text(lane) + "its warp did " + std::to_string(warp.issued) +
                    " wgmmas, the first one of its warpgroup " + std::to_string(first.issued);
            if (warp.registers != first.registers)
                return thread_text(lane) + "setmaxnreg of a part of its warpgroup";
        }
        unsigned launched = launched_registers(block.threads), had = 0, have = 0;
        for (const Warp &warp : block.warps) had += launched, have += warp.registers == 0 ? launched : warp.registers;
        if (have > had)
            return thread_text(block.lanes[0]) + "setmaxnreg waits for ever: warps have " + std::to_string(had) +
                " registers a lane together, and want " + std::to_string(have);
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
    return "where " + std::to_string(barrier->arrived) + " of " + std::to_string(barrier->expected) +
           " threads have arrived";
}

void barrier(const char *operation, unsigned id, unsigned threads, bool wait, Site site) {
    Lane *lane = this_lane();
    Block &block = *lane->owner;
    if (id >= 16) fail("%s: there is no barrier %u, only 0 to 15", operation, id);
    if (threads % 32 != 0) fail("%s: %u threads are not whole warps", operation, threads);
    if (threads == 0) threads = block.threads;
    if (threads > block.threads)
        fail("%s: %u threads are expected, the block has %u", operation, threads, block.threads);
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
    if (block.shared.back().region.pages == nullptr) fail("no memory is left for shared array %s", name);
    const SharedArray &before = block.shared[block.shared.size() - 2];
    uint32_t next = (before.address + (uint32_t)before.region.bytes + 1023) & ~1023u;
    block.shared.back().address = next + (uint32_t)((uintptr_t)block.shared.back().region.begin % 1024);
    // On a device static arrays come first, and the dynamic one begins at a multiple of its alignment.
    size_t dynamic = block.shared[0].region.bytes, all = 0, limit = shared_limit(executor->capability);
    for (size_t i = 1; i < block.shared.size(); i++) all += (block.shared[i].region.bytes + 15) & ~(size_t)15;
    if (dynamic > 0) all = ((all + 1023) & ~(size_t)1023) + dynamic;
    if (all > limit) fail("%zu bytes of shared memory with %s, of %zu that a block may have", all, name, limit);
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
    }
    if (array.region.pages != nullptr) array.region.poison();
    return array;
}

// ---- Clusters ----

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
    unfenced.clear();
    ready_count = running_count = 0;
    last_word = 0;
    for (Block &block : blocks) {
        for (Barrier &barrier : block.barriers) {
            barrier.arrived = 0;
            barrier.waiting.clear();
        }
        for (auto &warp : block.warps) warp = Warp();
        block.running = block.threads;
        block.fences = 0;
        block.shared.push_back(take_shared(nullptr, "DYNAMIC_SHARED", shared_bytes, 1024));
        if (block.shared[0].region.pages == nullptr) failure = "no memory is left for the blocks' shared memory";
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
    if (failure.empty()) go_to(choose(), &main_context);
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
            if (array.region.pages == nullptr) continue;
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
} // namespace host
