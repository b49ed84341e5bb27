//! Rotary embedding, in place: nothing else needs a projection before its rotation. The gradient rotates
//! backwards.

use crate::autograd::tape::Node;
use crate::autograd::{Gradients, Op, Tape, Var};
use crate::backend::RopeShape;
use crate::error::Result;
use crate::tensor::Tensor;

impl Tape<'_> {
    /// `xs` with each head's first `rotary_dim` elements rotated by its token's position.
    ///
    /// # Errors
    /// When shapes do not fit, or one of `xs` is still used elsewhere.
    pub fn rope<const N: usize>(
        &mut self,
        mut xs: [Var; N],
        table: &Tensor,
        positions: &Tensor,
        shapes: [RopeShape; N],
    ) -> Result<[Var; N]> {
        let mut all: Vec<_> = xs.iter_mut().map(|x| &mut x.tensor).zip(shapes).collect();
        self.backend.rope_all(&mut all, table, positions)?;
        let mut shapes = shapes.into_iter();
        Ok(xs.map(|x| {
            let shape = shapes.next().expect("there is one for each");
            self.record(x.tensor.clone(), [&x], false, || Op::Rope {
                table: table.clone(),
                positions: positions.clone(),
                shape,
            })
        }))
    }
}

/// The backward of rotations at the same positions.
pub(crate) fn backward(g: &mut Gradients<'_>, nodes: Vec<Node>) -> Result<()> {
    let (mut all, mut places) = (Vec::with_capacity(nodes.len()), None);
    for node in nodes {
        let Op::Rope { table, positions, shape } = node.op else {
            unreachable!("the node is one of a rotation")
        };
        if let (Some(dy), Some(id)) = (g.take(node.output), node.inputs[0]) {
            all.push((id, dy, RopeShape { inverse: !shape.inverse, ..shape }));
        }
        places = Some((table, positions));
    }
    if let Some((table, positions)) = &places {
        let mut tensors: Vec<_> = all.iter_mut().map(|(_, dy, shape)| (dy, *shape)).collect();
        g.backend.rope_all(&mut tensors, table, positions)?;
    }
    all.into_iter().try_for_each(|(id, dy, _)| g.add(id, dy))
}
