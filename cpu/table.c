// The table of one instruction set.
#include "table.h"

#define NAME_(isa) #isa
#define NAME(isa) NAME_(isa)

void JOIN(lowrank, _table, ISA)(struct kernel_table *table) {
    table->isa = NAME(ISA);
    TABLE_FN(gemm)(table);
    TABLE_FN(attention)(table);
    TABLE_FN(norm)(table);
    TABLE_FN(elementwise)(table);
    TABLE_FN(cross_entropy)(table);
    TABLE_FN(optimizer)(table);
    TABLE_FN(quant)(table);
}
