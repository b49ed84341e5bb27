//! Embedding lookup: `y[i] = table[ids[i]]`. The gradient exists only where the table is trained.

use crate::autograd::{Gradients, Op, Tape, Var};
use crate::error::Result;
use crate::model::Parameter;
use crate::param::ParamId;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// Rows `ids` (i32 `[tokens]`) of `table` (`[entries, cols]`): `[tokens, cols]`.
    ///
    /// # Errors
    /// When memory can't be had.
    pub fn embedding(&mut self, table: &Parameter, ids: &Tensor) -> Result<Var> {
        let weight = table.tensor(self.params)?;
        let mut y = self.empty(ids.elements(), weight.cols())?;
        self.backend.gather_rows(&mut y, &weight, ids)?;
        Ok(match table.id() {
            Some(table) => self.record(y, [], true, || Op::Embedding { table, ids: ids.clone() }),
            None => Var::constant(y),
        })
    }
}

pub(crate) fn backward(g: &mut Gradients<'_>, dy: &Tensor, table: ParamId, ids: &Tensor) -> Result<()> {
    g.backend.scatter_add_rows(&mut g.params.grad(table)?, dy, ids)
}
