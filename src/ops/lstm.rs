//! A bidirectional LSTM layer over a few rows, with PyTorch's gates: input, forget, cell, output.
//! Source: Hochreiter and Schmidhuber (1997), as in `torch.nn.LSTM`.

use crate::autograd::{Tape, Var};
use crate::backend::Activation::{Sigmoid, Tanh};
use crate::error::Result;
use crate::model::prompt::LstmDirection;

impl Tape<'_> {
    /// The hidden states forwards and backwards side by side, `[rows, 2 hidden]`, of `x` (`[rows, inputs]`).
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn lstm(&mut self, x: &Var, directions: &[LstmDirection; 2]) -> Result<Var> {
        let rows = x.tensor.rows();
        let hidden = directions[0].recurrent.in_features;
        let mut all: Option<Var> = None;
        for (number, direction) in directions.iter().enumerate() {
            let gates = self.linear(x, &direction.input)?;
            let zeros = self.backend.zeros(&[1, hidden], self.dtype)?;
            let (mut h, mut c) = (Var::constant(zeros.clone()), Var::constant(zeros));
            for step in 0..rows {
                let row = if number == 0 { step } else { rows - 1 - step };
                let own = self.row(&gates, row)?;
                let recurrent = self.linear(&h, &direction.recurrent)?;
                let sum = self.add(&own, &recurrent)?;
                let input = self.columns(&sum, 0, hidden)?;
                let forget = self.columns(&sum, hidden, hidden)?;
                let cell = self.columns(&sum, 2 * hidden, hidden)?;
                let output = self.columns(&sum, 3 * hidden, hidden)?;
                let kept = self.gated(&forget, &c, Sigmoid)?;
                let cell = self.activation(&cell, Tanh)?;
                let new = self.gated(&input, &cell, Sigmoid)?;
                c = self.add(&kept, &new)?;
                let state = self.activation(&c, Tanh)?;
                h = self.gated(&output, &state, Sigmoid)?;
                let placed = self.place(&h, [row, number * hidden], [rows, 2 * hidden])?;
                all = Some(match all {
                    None => placed,
                    Some(sum) => self.add(&sum, &placed)?,
                });
            }
        }
        match all {
            Some(all) => Ok(all),
            None => Ok(Var::constant(self.backend.zeros(&[0, 2 * hidden], self.dtype)?)),
        }
    }
}
