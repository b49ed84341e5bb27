//! A bottleneck adapter, made of other operations.

use crate::autograd::{Tape, Var};
use crate::error::Result;
use crate::model::Bottleneck;

impl Tape<'_> {
    /// A sublayer's output `h` with the adapter's; `x` is what `h` will be added to. `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn bottleneck(&mut self, x: &Var, h: &Var, adapter: &Bottleneck) -> Result<Var> {
        let mut input = match (adapter.parallel, adapter.sees_sum) {
            (true, _) => x.clone(),
            (false, true) => self.add(h, x)?,
            (false, false) => h.clone(),
        };
        if let Some(norm) = &adapter.norm_before {
            input = self.norm(&input, norm)?;
        }
        let inner = self.linear(&input, &adapter.down)?;
        let inner = self.activation(&inner, adapter.activation)?;
        let up = self.linear(&inner, &adapter.up)?;
        let up = self.scale(&up, adapter.scale)?;
        let mut up = self.dropout(&up, adapter.dropout, adapter.stream)?;
        let adds_first = adapter.adds_before_norm && !adapter.parallel;
        if adds_first {
            up = self.add(&up, h)?;
        }
        if let Some(norm) = &adapter.norm_after {
            up = self.norm(&up, norm)?;
        }
        if adds_first { Ok(up) } else { self.add(&up, h) }
    }
}
