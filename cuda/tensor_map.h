// The descriptor of a tensor that TMA copies boxes of; plain C, so that parameter structures can hold one. On a device
// cuTensorMapEncodeTiled makes it, for the host executor lowrank_host_encode_tensor_map (cuda/host/hopper.cc).
#ifndef LOWRANK_TENSOR_MAP_H
#define LOWRANK_TENSOR_MAP_H

#include <stdint.h>

struct tensor_map {
    uint64_t words[16];
} __attribute__((aligned(128)));

#endif
