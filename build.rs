//! Compiles `cpu/*.c` once per instruction set of the target. Which one runs is chosen at run time.

use std::env;

const SOURCES: [&str; 8] =
    ["attention", "cross_entropy", "elementwise", "gemm", "norm", "optimizer", "quant", "table"];
const HEADERS: [&str; 7] = ["gemm_kernel", "gemv", "kernels", "quant", "simd", "table", "vmath"];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed=cpu/{source}.c");
    }
    for header in HEADERS {
        println!("cargo::rerun-if-changed=cpu/{header}.h");
    }
    println!("cargo::rerun-if-changed=build.rs");
    compile("scalar", &[], &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        let avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"];
        compile("avx2", &["-mavx2", "-mfma", "-mf16c"], &["LOWRANK_AVX2"]);
        compile("avx512", &avx512, &["LOWRANK_AVX512"]);
        let with_bf16: Vec<&str> = avx512.into_iter().chain(["-mavx512bf16"]).collect();
        compile("avx512bf16", &with_bf16, &["LOWRANK_AVX512", "LOWRANK_AVX512BF16"]);
    }
}

fn compile(isa: &str, flags: &[&str], defines: &[&str]) {
    let mut build = cc::Build::new();
    build.opt_level(3).std("c11").warnings(true).extra_warnings(true);
    // The numerics law: a * b + c is two roundings unless the source says fma.
    build.flag("-ffp-contract=off").flag("-Wno-unused-function");
    for flag in flags {
        build.flag(flag);
    }
    for define in defines {
        build.define(define, None);
    }
    build.files(SOURCES.map(|source| format!("cpu/{source}.c")));
    build.compile(&format!("lowrank_{isa}"));
}
