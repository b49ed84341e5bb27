// Memory that shows errors: guard pages, poison, and what an address belongs to.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "executor.h"

namespace host {
static size_t page_size() {
    static const size_t size = (size_t)sysconf(_SC_PAGESIZE);
    return size;
}

// [guard page, pages, guard page] of at least `bytes`; null if the system has none left.
static unsigned char *map_guarded(size_t bytes, size_t &mapped) {
    size_t page = page_size();
    mapped = (bytes + page - 1) / page * page + 2 * page;
    void *pages = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return nullptr;
    if (mprotect((char *)pages + page, mapped - 2 * page, PROT_READ | PROT_WRITE) != 0) {
        munmap(pages, mapped);
        return nullptr;
    }
    return (unsigned char *)pages;
}

Region Region::map(size_t bytes, size_t alignment) {
    Region region;
    size_t padded = (bytes + alignment - 1) / alignment * alignment;
    region.pages = map_guarded(padded, region.mapped);
    if (region.pages == nullptr) return region;
    region.bytes = bytes;
    region.slack = padded - bytes;
    region.begin = region.pages + region.mapped - page_size() - padded;
    return region;
}

void Region::unmap() {
    if (pages != nullptr) munmap(pages, mapped);
    pages = nullptr;
}

void Region::poison() {
    unsigned char *first = pages + page_size();
    memset(first, 0xff, (size_t)(end() + slack - first));
}

const unsigned char *Region::written_outside() const {
    auto written = [](const unsigned char *from, const unsigned char *to) -> const unsigned char * {
        const unsigned char *at = std::find_if(from, to, [](unsigned char byte) { return byte != 0xff; });
        return at == to ? nullptr : at;
    };
    const unsigned char *after = written(end(), end() + slack);
    return after != nullptr ? after : written(pages + page_size(), begin);
}

// Device memory by address.
static std::mutex allocations_mutex;
static std::map<const unsigned char *, Region> &allocations() {
    static auto *map = new std::map<const unsigned char *, Region>;
    return *map;
}

// The allocation whose pages, guard pages included, hold the address.
static const Region *allocation_near(const void *address) {
    auto *p = (const unsigned char *)address;
    for (const auto &[begin, region] : allocations())
        if (p >= region.pages && p < region.pages + region.mapped) return &region;
    return nullptr;
}

static std::string distance(const Region &region, const void *address, const std::string &what) {
    auto *p = (const unsigned char *)address;
    std::string of = " " + what + " of " + std::to_string(region.bytes) + " bytes";
    if (p >= region.end()) return std::to_string(p - region.end()) + " bytes past the end of" + of;
    if (p < region.begin) return std::to_string(region.begin - p) + " bytes before" + of;
    return "byte " + std::to_string(p - region.begin) + " of" + of;
}

std::string describe_shared(const SharedArray &array, const void *address) {
    return distance(array.region, address, std::string("shared array ") + array.name);
}

std::string describe_address(const void *address) {
    auto *p = (const unsigned char *)address;
    if (executor != nullptr) {
        for (const Block &block : executor->blocks)
            for (const SharedArray &array : block.shared)
                if (p >= array.region.pages && p < array.region.pages + array.region.mapped)
                    return describe_shared(array, address);
        for (const Lane &lane : executor->lanes)
            if (lane.stack.pages != nullptr && p >= lane.stack.pages && p < lane.stack.pages + lane.stack.mapped)
                return "a thread's stack (do its local variables fit?)";
    }
    std::lock_guard<std::mutex> lock(allocations_mutex);
    const Region *region = allocation_near(address);
    return region != nullptr ? distance(*region, address, "an allocation") : "not near any allocation";
}

void check_shared(const char *operation, const void *p, size_t bytes, size_t alignment) {
    if ((uintptr_t)p % alignment != 0)
        fail("%s: shared address %p is not aligned to %zu bytes", operation, p, alignment);
    for (const SharedArray &array : this_lane()->owner->shared)
        if (array.region.holds(p, bytes)) return;
    fail("%s: %zu bytes at %p are not in shared memory: %s", operation, bytes, p, describe_address(p).c_str());
}

const void *shared_at(uint32_t address, size_t bytes) {
    for (const SharedArray &array : this_lane()->owner->shared) {
        if (address < array.address || address + bytes > array.address + array.region.bytes) continue;
        const void *p = array.region.begin + (address - array.address);
        async_read("wgmma", p, bytes);
        return p;
    }
    fail("a descriptor leads to %zu bytes at %#x, which is not in shared memory", bytes, address);
}

// The array that holds these bytes, in any block of the cluster, with what TMA and wgmma have seen.
static SharedArray &seen_array(const void *p, size_t bytes) {
    for (Block &block : executor->blocks)
        for (SharedArray &array : block.shared) {
            if (!array.region.holds(p, bytes)) continue;
            if (array.seen.empty()) {
                array.seen.assign(array.region.bytes, 0xff);
                array.fences.assign((array.region.bytes + 15) / 16, 0);
            }
            return array;
        }
    fail("%zu bytes at %p are not in shared memory", bytes, p);
}

void async_written(const void *p, size_t bytes) {
    SharedArray &array = seen_array(p, bytes);
    size_t first = (size_t)((const unsigned char *)p - array.region.begin);
    memcpy(&array.seen[first], p, bytes);
}

void async_read(const char *operation, const void *p, size_t bytes) {
    SharedArray &array = seen_array(p, bytes);
    unsigned now = this_lane()->owner->fences;
    size_t first = (size_t)((const unsigned char *)p - array.region.begin);
    for (size_t i = first / 16; i < (first + bytes + 15) / 16; i++) {
        size_t at = i * 16, size = std::min<size_t>(16, array.region.bytes - at);
        if (memcmp(&array.seen[at], array.region.begin + at, size) == 0) continue;
        if (array.fences[i] == now)
            fail("%s reads what threads wrote without fence_proxy_async: %s", operation,
                 describe_shared(array, array.region.begin + at).c_str());
        memcpy(&array.seen[at], array.region.begin + at, size);
        array.fences[i] = now;
    }
}

std::string written_outside_allocations(const void *params, size_t params_bytes) {
    std::lock_guard<std::mutex> lock(allocations_mutex);
    for (size_t i = 0; i + sizeof(void *) <= params_bytes; i += sizeof(void *)) {
        const void *pointer;
        memcpy(&pointer, (const char *)params + i, sizeof(pointer));
        const Region *region = allocation_near(pointer);
        const unsigned char *written = region == nullptr ? nullptr : region->written_outside();
        if (written == nullptr) continue;
        std::string where = distance(*region, written, "an allocation");
        memset(region->end(), 0xff, region->slack);
        return "wrote " + where;
    }
    return "";
}

Stack Stack::map(size_t n) {
    Stack stack;
    stack.pages = map_guarded(bytes, stack.mapped);
    stack.top = stack.pages + stack.mapped - page_size() - n * 11 % 64 * 64;
    return stack;
}

void Stack::unmap() {
    if (pages != nullptr) munmap(pages, mapped);
    pages = nullptr;
}
} // namespace host

uint32_t shared_address(const void *shared) {
    for (const host::SharedArray &array : host::this_lane()->owner->shared)
        if (array.region.holds(shared, 0))
            return array.address + (uint32_t)((const unsigned char *)shared - array.region.begin);
    host::fail("%p is not in shared memory", shared);
}

extern "C" __attribute__((visibility("default"))) void *lowrank_host_allocate(size_t bytes) {
    host::Region region = host::Region::map(bytes, 256);
    if (region.pages == nullptr) return nullptr;
    region.poison();
    std::lock_guard<std::mutex> lock(host::allocations_mutex);
    host::allocations()[region.begin] = region;
    return region.begin;
}

extern "C" __attribute__((visibility("default"))) void lowrank_host_free(void *begin) {
    std::lock_guard<std::mutex> lock(host::allocations_mutex);
    auto found = host::allocations().find((const unsigned char *)begin);
    if (found == host::allocations().end()) return;
    found->second.unmap();
    host::allocations().erase(found);
}
