//! The choice of instruction set, once, at run time.

use super::bindings::{self, kernel_table};
use crate::error::{Error, Result};
use std::ffi::CStr;
use std::mem::MaybeUninit;

/// An instruction set that the C kernels were compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain C.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with the bf16 dot product.
    Avx512Bf16,
}

impl Isa {
    /// All, from the plainest to the fastest.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// The name that `LOWRANK_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match self {
                Isa::Scalar => true,
                Isa::Avx2 => avx2,
                Isa::Avx512 => avx512,
                Isa::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Scalar
        }
    }

    /// The fastest that this processor has, or the one that the environment variable `LOWRANK_ISA` names.
    ///
    /// # Errors
    /// When the variable names none, or one that this processor lacks.
    pub fn choose() -> Result<Self> {
        let best = Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Scalar);
        let Ok(name) = std::env::var("LOWRANK_ISA") else { return Ok(best) };
        let names = || {
            Isa::ALL.into_iter().filter(|i| i.is_available()).map(Isa::name).collect::<Vec<_>>().join(", ")
        };
        Isa::ALL.into_iter().find(|isa| isa.name() == name && isa.is_available()).ok_or_else(|| {
            Error::config(
                "environment",
                "LOWRANK_ISA",
                format!("expected one of {}, found `{name}`", names()),
            )
        })
    }

    /// The kernels compiled for it.
    pub(super) fn table(self) -> kernel_table {
        let mut table = MaybeUninit::<kernel_table>::zeroed();
        // SAFETY: all-zero is a valid table (null pointers and `None`), and each function only fills the
        // structure that it is given.
        unsafe {
            match self {
                Isa::Scalar => bindings::lowrank_table_scalar(table.as_mut_ptr()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => bindings::lowrank_table_avx2(table.as_mut_ptr()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => bindings::lowrank_table_avx512(table.as_mut_ptr()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 => bindings::lowrank_table_avx512bf16(table.as_mut_ptr()),
                #[cfg(not(target_arch = "x86_64"))]
                _ => bindings::lowrank_table_scalar(table.as_mut_ptr()),
            }
            table.assume_init()
        }
    }

    /// The name that the compiled table says it has.
    pub(super) fn table_name(table: &kernel_table) -> &'static str {
        // SAFETY: the table's name is a string literal of the C source.
        unsafe { CStr::from_ptr(table.isa) }.to_str().unwrap_or("unknown")
    }
}
