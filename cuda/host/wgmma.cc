// wgmma on the host. A warp's part of an operation, sixteen rows of D, depends on no other warp, so each warp does
// its own when it waits for it.
#include "executor.h"

namespace host {
Warp &this_warp() {
    Lane *lane = this_lane();
    return lane->owner->warps[(size_t)(lane - lane->owner->lanes) / 32];
}

static void whole_warpgroup(const char *operation) {
    const Lane *lane = this_lane();
    unsigned thread = (unsigned)(lane - lane->owner->lanes);
    if ((thread & ~127u) + 128 > lane->owner->threads)
        fail("%s: the block has no whole warpgroup here, only %u threads", operation, lane->owner->threads);
}

// Registers change hands within a block: whoever wants more waits until others have given back as many.
void set_registers(unsigned count, bool more, Site site) {
    on_hopper("setmaxnreg");
    whole_warpgroup("setmaxnreg");
    if (executor->kernel->blocks == 0)
        fail("setmaxnreg is left out by the compiler: KERNEL doesn't say how many blocks a multiprocessor has");
    Warp &warp = this_warp();
    unsigned now = warp.registers == 0 ? launched_registers(this_lane()->owner->threads) : warp.registers;
    if (more ? count < now : count > now) fail("setmaxnreg: %u registers, now there are %u", count, now);
    collective("setmaxnreg", 0xffffffff, &count,
               [](uint32_t, void *const *deposits) { this_warp().registers = *(const unsigned *)deposits[0]; }, site);
}

void wgmma_fence(Site site) {
    on_hopper("wgmma_fence");
    whole_warpgroup("wgmma_fence");
    collective("wgmma_fence", 0xffffffff, nullptr, [](uint32_t, void *const *) { this_warp().fenced = true; }, site);
}

void wgmma_commit(Site site) {
    whole_warpgroup("wgmma_commit");
    collective(
        "wgmma_commit", 0xffffffff, nullptr, [](uint32_t, void *const *) { this_warp().wgmmas.commit(); }, site);
}

struct Issue {
    const Wgmma *operation;
    float *d;
};

static void issue(uint32_t, void *const *deposits) {
    Warp &warp = this_warp();
    auto *first = (const Issue *)deposits[0];
    const Wgmma &operation = *first->operation;
    if (!warp.fenced) fail("wgmma without a wgmma_fence after the last wgmma_wait");
    // All warps of the group do the same; each is performed by itself.
    const Lane *lane = this_lane();
    size_t number = (size_t)(lane - lane->owner->lanes) / 32;
    auto &of_group = lane->owner->warps[number & ~(size_t)3].of_group;
    if (warp.issued == of_group.size()) of_group.push_back(operation);
    const Wgmma &of_others = of_group[warp.issued];
    if (of_others.a != operation.a || of_others.b != operation.b || of_others.n != operation.n ||
        of_others.accumulate != operation.accumulate)
        fail("wgmma: descriptors or flags of the warps of a warpgroup differ");
    PendingWgmma pending{operation, {}, nullptr};
    int count = operation.n / 2;
    for (auto &live : warp.accumulators)
        if (live->d[0] == first->d && live->count == count) pending.sums = live;
    bool fresh = pending.sums == nullptr;
    if (fresh) {
        pending.sums = std::make_shared<Accumulators>();
        pending.sums->count = count;
        warp.accumulators.push_back(pending.sums);
    }
    for (unsigned l = 0; l < 32; l++) {
        auto *own = (const Issue *)deposits[l];
        const Wgmma &other = *own->operation;
        if (other.a != operation.a || other.b != operation.b || other.accumulate != operation.accumulate)
            fail("wgmma: descriptors or flags of lanes 0 and %u differ", l);
        memcpy(pending.registers[l], other.registers, sizeof other.registers);
        if (!fresh) continue;
        pending.sums->d[l] = own->d;
        memcpy(pending.sums->values[l], own->d, (size_t)count * sizeof(float));
        memset(own->d, 0xff, (size_t)count * sizeof(float)); // until the wait
    }
    pending.sums->in_flight++;
    warp.issued++;
    warp.wgmmas.items.push_back(pending);
}

void wgmma(const Wgmma &operation, float *d, Site site) {
    whole_warpgroup("wgmma");
    Issue deposit{&operation, d};
    collective("wgmma", 0xffffffff, &deposit, issue, site);
}

// Eight neighbours in a tile: of k for K-major, of rows for MN-major.
struct Tile {
    uint32_t start, leading, stride, bits; // bits of the swizzle
    bool mn_major;

    Tile(uint64_t descriptor, bool mn_major_) : mn_major(mn_major_) {
        start = (uint32_t)(descriptor & 0x3fff) << 4;
        leading = (uint32_t)(descriptor >> 16 & 0x3fff) << 4;
        stride = (uint32_t)(descriptor >> 32 & 0x3fff) << 4;
        uint32_t swizzle = (uint32_t)(descriptor >> 62);
        bits = swizzle == 0 ? 0 : 4 - swizzle;
        if (descriptor >> 49 & 7) fail("wgmma: a base offset in a descriptor is not supported");
        // The pattern of a swizzle is that of the address, and without a base offset it begins with the tile.
        unsigned line = 16u << bits;
        if (bits != 0 && start % (8 * line) >= line)
            fail("wgmma: a tile at %#x, expected a multiple of %u bytes, or a place in its first line", start, 8 * line);
    }
    // `row`, or k for MN-major, and which chunk of eight along the other direction.
    void load(unsigned line, unsigned chunk, float *to) const {
        unsigned width = 16u << bits; // bytes of a line of an atom
        uint32_t at = start + line % 8 * width;
        if (bits == 0 && mn_major) at += line / 8 * leading + chunk * stride;
        else if (bits == 0) at += line / 8 * stride + chunk * leading;
        else if (mn_major) at += line / 8 * stride + chunk / (width / 16) * leading + chunk % (width / 16) * 16;
        else at += line / 8 * stride + chunk * 16;
        at ^= at >> 3 & ((1u << bits) - 1) << 4;
        const uint16_t *from = (const uint16_t *)shared_at(at, 16);
        for (int i = 0; i < 8; i++) to[i] = to_float(bf16{from[i]});
    }
    // [rows, 16] from row `first` on, or its transpose.
    template <typename Store> void read(unsigned first, unsigned rows, Store store) const {
        float eight[8];
        for (unsigned line = 0; line < (mn_major ? 16 : rows); line++) {
            for (unsigned chunk = 0; chunk < (mn_major ? rows / 8 : 2); chunk++) {
                load(mn_major ? line : first + line, mn_major ? first / 8 + chunk : chunk, eight);
                for (unsigned i = 0; i < 8; i++) {
                    if (mn_major) store(chunk * 8 + i, line, eight[i]);
                    else store(line, chunk * 8 + i, eight[i]);
                }
            }
        }
    }
};

static void perform(PendingWgmma &pending) {
    const Wgmma &op = pending.operation;
    const Lane *lane = this_lane();
    unsigned first = (unsigned)(lane - lane->owner->lanes) / 32 % 4 * 16;
    auto &a = executor->wgmma_a;
    auto &b = executor->wgmma_b;
    if (op.a_in_registers) {
        for (unsigned l = 0; l < 32; l++)
            for (unsigned i = 0; i < 4; i++)
                for (unsigned half = 0; half < 2; half++)
                    a[l / 4 + i % 2 * 8][l % 4 * 2 + half + i / 2 * 8] =
                        to_float(bf16{(uint16_t)(pending.registers[l][i] >> 16 * half)});
    } else {
        Tile(op.a, op.trans_a).read(first, 16, [&](unsigned row, unsigned k, float x) { a[row][k] = x; });
    }
    Tile(op.b, op.trans_b).read(0, (unsigned)op.n, [&](unsigned row, unsigned k, float x) { b[k][row] = x; });
    typedef float Row __attribute__((vector_size(32)));
    auto &eights = executor->wgmma_eights;
    for (int j = 0; j < op.n / 8 && executor->sums_as_chip; j++)
        for (unsigned k = 0; k < 16; k++) eights[j][k] = Eight(b[k] + 8 * j, core_bf16);
    Accumulators &sums = *pending.sums;
    for (unsigned i = 0; i < 16; i++) {
        for (int j = 0; j < op.n / 8; j++) {
            auto at = [&](unsigned t) { return sums.values[i % 8 * 4 + t] + j * 4 + i / 8 * 2; };
            Row sum = {};
            for (unsigned t = 0; t < 4 && op.accumulate; t++) {
                sum[2 * t] = at(t)[0];
                sum[2 * t + 1] = at(t)[1];
            }
            for (unsigned k = 0; k < 16 && !executor->sums_as_chip; k++) sum += a[i][k] * *(const Row *)(b[k] + 8 * j);
            if (executor->sums_as_chip) add_products((float *)&sum, a[i], eights[j], 16, core_bf16);
            for (unsigned t = 0; t < 4; t++) {
                at(t)[0] = sum[2 * t];
                at(t)[1] = sum[2 * t + 1];
            }
        }
    }
    if (--sums.in_flight > 0) return;
    for (unsigned l = 0; l < 32; l++) memcpy(sums.d[l], sums.values[l], (size_t)sums.count * sizeof(float));
    auto &live = this_warp().accumulators;
    for (size_t i = 0; i < live.size(); i++)
        if (live[i].get() == &sums) live.erase(live.begin() + (ptrdiff_t)i--);
}

void wgmma_wait(unsigned groups, Site site) {
    whole_warpgroup("wgmma_wait");
    auto compute = [](uint32_t, void *const *deposits) {
        Warp &warp = this_warp();
        warp.wgmmas.land(*(const unsigned *)deposits[0], perform);
        warp.fenced = false;
    };
    collective("wgmma_wait", 0xffffffff, &groups, compute, site);
}
} // namespace host
