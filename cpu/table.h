// Each source fills its part of an instruction set's table; table.c joins the parts.
#ifndef LOWRANK_TABLE_H
#define LOWRANK_TABLE_H

#include "kernels.h"

#if defined(LOWRANK_AVX512BF16)
#define ISA avx512bf16
#elif defined(LOWRANK_AVX512)
#define ISA avx512
#elif defined(LOWRANK_AVX2)
#define ISA avx2
#else
#define ISA scalar
#endif

#define JOIN_(a, b, c) a##b##_##c
#define JOIN(a, b, c) JOIN_(a, b, c)
#define TABLE_FN(part) JOIN(lowrank_fill_, part, ISA)

void TABLE_FN(gemm)(struct kernel_table *table);
void TABLE_FN(attention)(struct kernel_table *table);
void TABLE_FN(norm)(struct kernel_table *table);
void TABLE_FN(elementwise)(struct kernel_table *table);
void TABLE_FN(cross_entropy)(struct kernel_table *table);
void TABLE_FN(optimizer)(struct kernel_table *table);
void TABLE_FN(quant)(struct kernel_table *table);

#endif
