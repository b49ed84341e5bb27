//! One table of cases over every operation: random operands of odd sizes in both types, the operation, and
//! whether the numerics law fixes its bits. Parity tests and benchmarks run the same table.

mod element;
mod matrix;
mod row;

use half::{bf16, f16};
use lowrank::backend::Backend;
use lowrank::backend::reference::Reference;
use lowrank::rng::{Philox, PhiloxKey, Stream};
use lowrank::{DType, Result, Tensor};

/// An operand before upload; values are exact in `dtype`.
#[derive(Clone)]
pub struct Operand {
    pub values: Vec<f32>,
    pub shape: Vec<usize>,
    pub dtype: DType,
}

impl Operand {
    pub fn new(shape: &[usize], dtype: DType, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), shape.iter().product::<usize>());
        let values = values.into_iter().map(|x| round(x, dtype)).collect();
        Operand { values, shape: shape.to_vec(), dtype }
    }

    /// A result whose old content must not matter.
    pub fn overwritten(shape: &[usize], dtype: DType) -> Self {
        Operand::new(shape, dtype, vec![f32::NAN; shape.iter().product()])
    }

    pub fn indices(values: &[usize]) -> Self {
        Operand::new(&[values.len()], DType::I32, values.iter().map(|i| *i as f32).collect())
    }

    /// Uploads the operand, one element behind an aligned address if `misaligned`.
    pub fn upload(&self, backend: &Backend, misaligned: bool) -> Result<Tensor> {
        let front = usize::from(misaligned);
        let padded = [vec![0.0; front], self.values.clone()].concat();
        let len = padded.len();
        let tensor = match self.dtype {
            DType::F32 => backend.from_slice(&padded, &[len])?,
            DType::I32 => {
                backend.from_slice(&padded.iter().map(|x| *x as i32).collect::<Vec<_>>(), &[len])?
            }
            DType::BF16 => {
                backend.from_slice(&padded.into_iter().map(bf16::from_f32).collect::<Vec<_>>(), &[len])?
            }
            DType::F16 => {
                backend.from_slice(&padded.into_iter().map(f16::from_f32).collect::<Vec<_>>(), &[len])?
            }
            DType::U8 => unreachable!("no operation takes bytes"),
        };
        tensor.slice(front..len)?.reshape(&self.shape)
    }
}

fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

type Operation = Box<dyn Fn(&Backend, &mut [Tensor]) -> Result<()>>;

/// One case: an operation and its operands.
pub struct Case {
    pub name: String,
    /// Whether every backend has to produce the same bits.
    pub bitwise: bool,
    /// Operands, the results first.
    pub operands: Vec<Operand>,
    /// How many of the operands are results.
    pub results: usize,
    pub operation: Operation,
}

impl Case {
    /// Runs the case; the results as f32.
    pub fn run(&self, backend: &Backend, misaligned: bool) -> Vec<Vec<f32>> {
        self.run_on(backend, &self.operands, misaligned)
    }

    /// The results in f64 arithmetic, every float stored as f32.
    pub fn truth(&self) -> Vec<Vec<f32>> {
        let widened = |x: &Operand| match x.dtype {
            DType::BF16 | DType::F16 => Operand { dtype: DType::F32, ..x.clone() },
            _ => x.clone(),
        };
        let operands: Vec<_> = self.operands.iter().map(widened).collect();
        self.run_on(&Reference::<f64>::backend(), &operands, false)
    }

    fn run_on(&self, backend: &Backend, operands: &[Operand], misaligned: bool) -> Vec<Vec<f32>> {
        let upload = |x: &Operand| x.upload(backend, misaligned).unwrap();
        let mut tensors: Vec<Tensor> = operands.iter().map(upload).collect();
        (self.operation)(backend, &mut tensors).unwrap_or_else(|e| panic!("{}: {e}", self.name));
        tensors[..self.results].iter().map(|x| backend.to_f32(x).unwrap()).collect()
    }
}

/// The table under construction, with its source of random numbers.
pub struct Table {
    pub cases: Vec<Case>,
    rng: Philox,
}

impl Table {
    pub fn new() -> Self {
        Table { cases: Vec::new(), rng: Philox::new(PhiloxKey::new(42, Stream::Dummy, 0)) }
    }

    /// A standard normal operand.
    pub fn normal(&mut self, shape: &[usize], dtype: DType) -> Operand {
        self.scaled(shape, dtype, 1.0)
    }

    /// A normal operand with this standard deviation.
    pub fn scaled(&mut self, shape: &[usize], dtype: DType, deviation: f32) -> Operand {
        let values = (0..shape.iter().product()).map(|_| deviation * self.rng.normal()).collect();
        Operand::new(shape, dtype, values)
    }

    /// Random indices below `bound`.
    pub fn below(&mut self, n: usize, bound: usize) -> Operand {
        Operand::indices(&(0..n).map(|_| self.rng.below(bound as u32) as usize).collect::<Vec<_>>())
    }

    /// Adds a case; gives its results in f64 arithmetic, rounded to their types, for cases that build on it.
    pub fn add(
        &mut self,
        name: String,
        bitwise: bool,
        results: usize,
        operands: Vec<Operand>,
        operation: impl Fn(&Backend, &mut [Tensor]) -> Result<()> + 'static,
    ) -> Vec<Operand> {
        let case = Case { name, bitwise, operands, results, operation: Box::new(operation) };
        let values = case.run(&Reference::<f64>::backend(), false);
        let results = values
            .into_iter()
            .zip(&case.operands)
            .map(|(values, like)| Operand::new(&like.shape, like.dtype, values))
            .collect();
        self.cases.push(case);
        results
    }
}

/// All cases with activations of type `dtype`.
pub fn all(dtype: DType) -> Vec<Case> {
    let mut table = Table::new();
    matrix::add(&mut table, dtype);
    row::add(&mut table, dtype);
    element::add(&mut table, dtype);
    matrix::add_row_terms(&mut table, dtype);
    table.cases
}
