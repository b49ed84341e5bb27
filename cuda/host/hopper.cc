// mbarriers, TMA and clusters on the host.
#include <algorithm>

#include "executor.h"

namespace host {
// ---- Shared memory of the cluster ----

static Block &block_of_rank(unsigned rank) {
    if (rank == own_block) return *this_lane()->owner;
    if (rank >= executor->blocks.size())
        fail("the cluster has %zu blocks, none of rank %u", executor->blocks.size(), rank);
    Block &block = executor->blocks[rank];
    if (block.running == 0) fail("block %u of the cluster has already exited", rank);
    return block;
}

// The same place in shared memory of another block of the cluster.
template <typename T> static T *in_block(T *shared, size_t bytes, unsigned rank) {
    Block &block = block_of_rank(rank);
    if (&block == this_lane()->owner) return shared;
    for (const SharedArray &own : this_lane()->owner->shared) {
        if (!own.region.holds(shared, bytes)) continue;
        for (const SharedArray &other : block.shared)
            if (other.key == own.key)
                return (T *)(other.region.begin + ((const unsigned char *)shared - own.region.begin));
    }
    fail("block %u of the cluster does not have this shared memory yet: a cluster barrier is missing", rank);
}

void on_hopper(const char *operation) {
    if (executor->capability != 90) fail("%s: this chip, sm_%u, has no such operation", operation, executor->capability);
}

unsigned cluster_rank() { return (unsigned)(this_lane()->owner - executor->blocks.data()); }
unsigned cluster_blocks() { return (unsigned)executor->blocks.size(); }

void cluster_arrive() {
    ClusterBarrier &barrier = executor->cluster_barrier;
    Lane *lane = this_lane();
    if (lane->cluster_phase != none) fail("cluster_arrive twice without cluster_wait");
    lane->cluster_phase = barrier.phase;
    unsigned threads = 0;
    for (const Block &block : executor->blocks) threads += block.threads;
    if (++barrier.arrived < threads) return;
    barrier.arrived = 0;
    barrier.phase++;
    for (Lane *waiting : barrier.waiting) executor->make_ready(waiting);
    barrier.waiting.clear();
}

void cluster_wait(Site site) {
    ClusterBarrier &barrier = executor->cluster_barrier;
    Lane *lane = this_lane();
    if (lane->cluster_phase == none) fail("cluster_wait without cluster_arrive");
    if (lane->cluster_phase == barrier.phase) {
        barrier.waiting.push_back(lane);
        executor->wait("cluster_wait", site);
    }
    lane->cluster_phase = none;
}

float4 load_remote(const float4 *shared, unsigned rank) {
    check_shared("load_remote", shared, sizeof *shared, 16);
    return *in_block(shared, sizeof *shared, rank);
}

// ---- mbarriers ----

struct MBarrier {
    uint64_t pending : 20, expected : 20;
    int64_t bytes : 21; // still to come
    uint64_t phase : 1, tag : 2;
};
static_assert(sizeof(MBarrier) == sizeof(uint64_t), "as on the device");
constexpr unsigned known_to_threads = 1, known_to_all = 2; // neither zeros nor poison
constexpr unsigned most_bytes = (1 << 20) - 1;             // that a phase may wait for

static MBarrier &mbarrier(const char *operation, uint64_t *barrier) {
    auto &b = *(MBarrier *)barrier;
    if (b.tag != known_to_threads && b.tag != known_to_all) fail("%s: the mbarrier is not initialised", operation);
    return b;
}

// One that TMA or another block has to do with.
static MBarrier &fenced_mbarrier(const char *operation, uint64_t *barrier) {
    MBarrier &b = mbarrier(operation, barrier);
    if (b.tag != known_to_all) fail("%s: no fence_mbarrier_init after mbarrier_init", operation);
    return b;
}

static std::string mbarrier_text(const void *object) {
    const auto &b = *(const MBarrier *)object;
    return "where " + std::to_string(b.pending) + " of " + std::to_string(b.expected) + " arrivals and " +
        std::to_string(b.bytes) + " bytes are missing in the phase of parity " + std::to_string(b.phase);
}

void mbarrier_init(uint64_t *barrier, unsigned count) {
    on_hopper("mbarrier_init");
    check_shared("mbarrier_init", barrier, 8, 8);
    if (count == 0 || count >= 1 << 20) fail("mbarrier_init: a count of %u", count);
    auto &b = *(MBarrier *)barrier;
    b.pending = b.expected = count;
    b.bytes = 0;
    b.phase = 0;
    b.tag = known_to_threads;
    executor->unfenced.push_back({barrier, this_lane()});
}

void fence_mbarrier_init() {
    auto &unfenced = executor->unfenced;
    auto own = [](auto &entry) { return entry.second == this_lane(); };
    for (auto &entry : unfenced)
        if (own(entry)) ((MBarrier *)entry.first)->tag = known_to_all;
    unfenced.erase(std::remove_if(unfenced.begin(), unfenced.end(), own), unfenced.end());
}

static void end_phase_if_complete(MBarrier &b) {
    if (b.pending != 0 || b.bytes != 0) return;
    b.pending = b.expected;
    b.phase ^= 1;
    auto &waiters = executor->mbarrier_waiters;
    for (size_t i = 0; i < waiters.size();) {
        if (waiters[i].first != &b) {
            i++;
            continue;
        }
        executor->make_ready(waiters[i].second);
        waiters[i] = waiters.back();
        waiters.pop_back();
    }
}

void mbarrier_arrive(uint64_t *barrier, unsigned expected_bytes, unsigned rank) {
    check_shared("mbarrier_arrive", barrier, 8, 8);
    uint64_t *there = in_block(barrier, 8, rank);
    MBarrier &b =
        rank == own_block ? mbarrier("mbarrier_arrive", there) : fenced_mbarrier("mbarrier_arrive", there);
    if (expected_bytes > most_bytes || b.bytes + (int64_t)expected_bytes > most_bytes)
        fail("mbarrier_arrive: %u more bytes, a phase waits for at most %u", expected_bytes, most_bytes);
    b.bytes += expected_bytes;
    if (b.pending == 0)
        fail("mbarrier_arrive: all %u arrivals of this phase have come already", (unsigned)b.expected);
    b.pending--;
    end_phase_if_complete(b);
}

static void complete_bytes(uint64_t *barrier, size_t bytes) {
    MBarrier &b = mbarrier("a copy that lands", barrier);
    b.bytes -= (int64_t)bytes;
    end_phase_if_complete(b);
}

void mbarrier_wait(uint64_t *barrier, unsigned parity, Site site) {
    check_shared("mbarrier_wait", barrier, 8, 8);
    if (parity > 1) fail("mbarrier_wait: a parity of %u", parity);
    MBarrier &b = mbarrier("mbarrier_wait", barrier);
    // Like the device it looks again when it wakes: if two phases have gone by, it waits on.
    while (b.phase == parity) {
        executor->mbarrier_waiters.push_back({&b, this_lane()});
        executor->wait("mbarrier_wait", site, &b, mbarrier_text);
    }
}

// ---- TMA ----

void Executor::land(size_t index) {
    InFlight copy = std::move(in_flight[index]);
    in_flight.erase(in_flight.begin() + (ptrdiff_t)index);
    ThreadView *running = self;
    self = copy.lane; // whom a failure is about
    copy.land();
    self = running;
}

// Starts a copy; with threads in random order half of them land at once.
static void start(std::function<void()> land) {
    if (executor->order == Order::random && executor->random.next() & 1) return land();
    executor->in_flight.push_back({this_lane(), std::move(land)});
}

struct HostTensorMap {
    uint64_t magic;
    unsigned char *base;
    uint64_t dims[5], strides[5]; // elements; bytes, the first one's being the element's
    uint16_t box[5];
    uint8_t rank, swizzle; // bits that are exchanged
};
static_assert(sizeof(HostTensorMap) <= sizeof(tensor_map), "fits");
constexpr uint64_t host_magic = 0x70616d20726f7374;

// Address bits 4 to 3 + bits, xor those three further up.
static uintptr_t swizzled(uintptr_t address, unsigned bits) {
    return address ^ ((address >> 3) & (((1u << bits) - 1) << 4));
}

static const HostTensorMap &host_map(const char *operation, const tensor_map *map, size_t coordinates) {
    auto &m = *(const HostTensorMap *)map;
    if ((uintptr_t)map % 64 != 0) fail("%s: the tensor map is not 64-byte aligned", operation);
    if (m.magic != host_magic) fail("%s: no tensor map that lowrank_host_encode_tensor_map made", operation);
    if (m.rank != coordinates)
        fail("%s: %zu coordinates for a tensor of %u dimensions", operation, coordinates, m.rank);
    return m;
}

static size_t box_bytes(const HostTensorMap &m) {
    size_t bytes = m.strides[0];
    for (unsigned d = 0; d < m.rank; d++) bytes *= m.box[d];
    return bytes;
}

// The swizzle's pattern repeats after eight lines; where it begins in the middle, wgmma could not be told.
static size_t box_alignment(const HostTensorMap &m) { return 128u << m.swizzle; }

struct Box {
    HostTensorMap map;
    int at[5];
    unsigned char *shared;
};

static Box make_box(const HostTensorMap &map, const void *shared, std::initializer_list<int> at) {
    Box box{map, {}, (unsigned char *)shared};
    std::copy(at.begin(), at.end(), box.at);
    return box;
}

// Calls visit(shared address, global address or null where it is outside of the tensor, bytes) for every element.
template <typename Visit> static void for_elements(const Box &box, Visit visit) {
    const HostTensorMap &m = box.map;
    size_t element = m.strides[0], rows = box_bytes(m) / element / m.box[0];
    for (size_t row = 0; row < rows; row++) {
        bool inside = true;
        unsigned char *line = m.base;
        size_t rest = row;
        for (unsigned d = 1; d < m.rank; d++) {
            int64_t at = box.at[d] + (int64_t)(rest % m.box[d]);
            rest /= m.box[d];
            inside = inside && at >= 0 && at < (int64_t)m.dims[d];
            line += at * (int64_t)m.strides[d];
        }
        for (size_t i = 0; i < m.box[0]; i++) {
            int64_t at = box.at[0] + (int64_t)i;
            bool valid = inside && at >= 0 && at < (int64_t)m.dims[0];
            auto to = swizzled((uintptr_t)box.shared + (row * m.box[0] + i) * element, m.swizzle);
            visit((void *)to, valid ? line + at * (int64_t)element : nullptr, element);
        }
    }
}

static void load_box(const Box &box) {
    for_elements(box, [](void *shared, const unsigned char *global, size_t bytes) {
        if (global != nullptr) memcpy(shared, global, bytes);
        else memset(shared, 0, bytes);
    });
}

void tma_load(void *shared, const tensor_map *map, uint64_t *barrier, uint16_t blocks,
              std::initializer_list<int> at) {
    const HostTensorMap &m = host_map("tma_load", map, at.size());
    size_t bytes = box_bytes(m);
    check_shared("tma_load", shared, bytes, box_alignment(m));
    check_shared("tma_load", barrier, 8, 8);
    if (blocks == 0) blocks = (uint16_t)(1u << cluster_rank());
    for (unsigned rank = 0; rank < 16; rank++) {
        if (!(blocks >> rank & 1)) continue;
        Box box = make_box(m, in_block((unsigned char *)shared, bytes, rank), at);
        uint64_t *there = in_block(barrier, 8, rank);
        fenced_mbarrier("tma_load", there);
        start([=] {
            load_box(box);
            async_written(box.shared, bytes);
            complete_bytes(there, bytes);
        });
    }
}

void bulk_load(void *shared, const void *global, unsigned bytes, uint64_t *barrier) {
    check_shared("bulk_load", shared, bytes, 16);
    check_shared("bulk_load", barrier, 8, 8);
    check_aligned(global, 16);
    if (bytes % 16 != 0) fail("bulk_load: %u bytes are not a multiple of 16", bytes);
    fenced_mbarrier("bulk_load", barrier);
    start([=] {
        memcpy(shared, global, bytes);
        async_written(shared, bytes);
        complete_bytes(barrier, bytes);
    });
}

void tma_store(const tensor_map *map, const void *shared, std::initializer_list<int> at) {
    const HostTensorMap &m = host_map("tma_store", map, at.size());
    check_shared("tma_store", shared, box_bytes(m), box_alignment(m));
    async_read("tma_store", shared, box_bytes(m));
    Box box = make_box(m, shared, at);
    auto land = [=] {
        for_elements(box, [](const void *from, unsigned char *global, size_t bytes) {
            if (global != nullptr) memcpy(global, from, bytes);
        });
    };
    if (executor->order == Order::random && executor->random.next() & 1) return land();
    this_lane()->stores.items.push_back(land);
}
void tma_store_commit() { this_lane()->stores.commit(); }
void tma_store_wait(unsigned groups) {
    this_lane()->stores.land(groups, [](const std::function<void()> &land) { land(); });
}

void fence_proxy_async() { this_lane()->owner->fences++; }

// ---- Warps ----

bool elect_one(Site site) {
    collective("elect_one", 0xffffffff, nullptr, nullptr, site);
    return this_lane()->lane == 0;
}
} // namespace host

// Makes the host's form of a tensor map; arguments as of cuTensorMapEncodeTiled: sizes of the tensor in elements
// and of the box, innermost first; strides in bytes of the dimensions after the first; swizzle 0 none, 1 to 3: 32,
// 64, 128 bytes. 0, or 1 with a message.
extern "C" __attribute__((visibility("default"))) int
lowrank_host_encode_tensor_map(void *map, unsigned element_bytes, unsigned rank, void *base, const uint64_t *dims,
                               const uint64_t *strides, const uint32_t *box, int swizzle, char *message,
                               size_t message_bytes) {
    host::HostTensorMap m = {};
    auto wrong = [&](const std::string &what) {
        if (message_bytes > 0) snprintf(message, message_bytes, "tensor map: %s", what.c_str());
        return 1;
    };
    if (rank < 1 || rank > 5) return wrong(std::to_string(rank) + " dimensions, expected 1 to 5");
    if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4 && element_bytes != 8)
        return wrong("elements of " + std::to_string(element_bytes) + " bytes");
    if ((uintptr_t)base % 16 != 0) return wrong("the tensor is not 16-byte aligned");
    if (swizzle < 0 || swizzle > 3) return wrong("swizzle " + std::to_string(swizzle) + ", expected 0 to 3");
    m.strides[0] = element_bytes;
    for (unsigned d = 0; d < rank; d++) {
        std::string dimension = "dimension " + std::to_string(d);
        if (dims[d] == 0 || dims[d] > (uint64_t)1 << 32)
            return wrong(dimension + " has " + std::to_string(dims[d]) + " elements");
        if (box[d] == 0 || box[d] > 256)
            return wrong(dimension + " has a box of " + std::to_string(box[d]) + ", expected 1 to 256");
        uint64_t least = d == 0 ? 0 : d == 1 ? dims[0] * element_bytes : dims[d - 1] * strides[d - 2];
        if (d > 0 && (strides[d - 1] % 16 != 0 || strides[d - 1] < least || strides[d - 1] >> 40 != 0))
            return wrong(dimension + " has a stride of " + std::to_string(strides[d - 1]) +
                         " bytes, expected a multiple of 16, " + std::to_string(least) + " or more, below 2^40");
        m.dims[d] = dims[d];
        m.box[d] = (uint16_t)box[d];
        if (d > 0) m.strides[d] = strides[d - 1];
    }
    unsigned inner = box[0] * element_bytes, span = swizzle == 0 ? 0 : 16u << swizzle;
    if (inner % 16 != 0)
        return wrong("the box's rows have " + std::to_string(inner) + " bytes, expected a multiple of 16");
    if (span != 0 && inner != span)
        return wrong("the box's rows have " + std::to_string(inner) + " bytes, expected the swizzle's " +
                     std::to_string(span));
    m.magic = host::host_magic;
    m.base = (unsigned char *)base;
    m.rank = (uint8_t)rank;
    m.swizzle = (uint8_t)swizzle;
    memset(map, 0, sizeof(tensor_map));
    memcpy(map, &m, sizeof m);
    return 0;
}
