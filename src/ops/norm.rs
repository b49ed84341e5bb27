//! RMSNorm and LayerNorm over groups of the weight's length (whole rows, or heads within rows).

use crate::autograd::{Gradients, Op, Tape, ValueId, Var};
use crate::dtype::DType;
use crate::error::Result;
use crate::model::module::factors;
use crate::model::{Norm, Parameter};
use crate::param::ParamId;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// The normalized `x`, `[tokens, cols]`; each group of the weight's length is normalized by itself.
    ///
    /// # Errors
    /// When the weight's length does not divide the columns.
    pub fn norm(&mut self, x: &Var, norm: &Norm) -> Result<Var> {
        if norm.is_apart() {
            let [y] = self.by_slot(x, |tape, x, slot, _| Ok([tape.norm(x, &norm.of_slot(slot))?]))?;
            return Ok(y);
        }
        let weight = norm.factors(self.params, &self.backend)?;
        let group = weight.elements();
        let groups = x.tensor.elements() / group;
        let rows = x.tensor.reshape(&[groups, group])?;
        let mut y = self.empty(groups, group)?;
        let stats = if norm.layer_norm {
            let bias = norm.bias.as_ref().map(|b| b.tensor(self.params)).transpose()?;
            let mut stats = self.backend.empty(&[groups, 2], DType::F32)?;
            self.backend.layer_norm(&mut y, &mut stats, &rows, &weight, bias.as_ref(), norm.eps)?;
            stats
        } else {
            let mut rstd = self.backend.empty(&[groups], DType::F32)?;
            self.backend.rms_norm(&mut y, &mut rstd, &rows, &weight, norm.eps)?;
            rstd
        };
        let y = y.reshape(x.tensor.shape())?;
        Ok(self.record_norm(x, norm, rows, stats, y))
    }

    /// `a + b`, and [`Tape::norm`] of it.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn add_norm(&mut self, a: &Var, b: &Var, norm: &Norm) -> Result<(Var, Var)> {
        if norm.is_apart() || norm.layer_norm {
            let sum = self.add(a, b)?;
            let y = self.norm(&sum, norm)?;
            return Ok((sum, y));
        }
        let weight = norm.factors(self.params, &self.backend)?;
        let (rows, cols) = (a.tensor.rows(), a.tensor.cols());
        let (mut sum, mut y) = (self.empty(rows, cols)?, self.empty(rows, cols)?);
        let mut rstd = self.backend.empty(&[rows], DType::F32)?;
        let (to, from) = ([&mut sum, &mut y, &mut rstd], [&a.tensor, &b.tensor]);
        self.backend.add_rms_norm(to, from, &weight, norm.eps)?;
        let sum = self.record(sum, [a, b], false, || Op::Add);
        let y = self.record_norm(&sum, norm, sum.tensor.clone(), rstd, y);
        Ok((sum, y))
    }

    fn record_norm(&mut self, x: &Var, norm: &Norm, rows: Tensor, stats: Tensor, y: Tensor) -> Var {
        let bias = norm.bias.as_ref().and_then(Parameter::id);
        let trainable = norm.weight.id().is_some() || bias.is_some();
        self.record(y, [x], trainable, || Op::Norm {
            x: rows,
            stats,
            weight: norm.weight.clone(),
            bias,
            layer_norm: norm.layer_norm,
            plus_one: norm.plus_one,
        })
    }
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn backward(
    g: &mut Gradients<'_>,
    inputs: [Option<ValueId>; 3],
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    weight: &Parameter,
    bias: Option<ParamId>,
    layer_norm: bool,
    plus_one: bool,
) -> Result<()> {
    let (backend, params) = (g.backend.clone(), g.params);
    let values = factors(weight, plus_one, params, &backend)?;
    let mut dweight = weight.id().map(|id| params.grad(id)).transpose()?;
    let mut dbias = bias.map(|id| params.grad(id)).transpose()?;
    let grouped_dy = dy.reshape(x.shape())?;
    let mut run = |dx: Option<&mut Tensor>, accumulate: bool| {
        if layer_norm {
            backend.layer_norm_backward(
                dx,
                accumulate,
                dweight.as_mut(),
                dbias.as_mut(),
                &grouped_dy,
                x,
                stats,
                &values,
            )
        } else {
            backend.rms_norm_backward(dx, accumulate, dweight.as_mut(), &grouped_dy, x, stats, &values)
        }
    };
    match inputs[0] {
        None => run(None, false),
        Some(id) => g.accumulate(id, dy.shape(), |dx, accumulate| {
            let mut grouped = dx.reshape(x.shape())?;
            run(Some(&mut grouped), accumulate)
        }),
    }
}
