//! Compiles `cpu/*.c` once per instruction set of the target, of which one is chosen at run time, and, where nvcc is
//! found, `cuda/*.cu` for every chip. A kernel that spills registers, or whose wgmma or setmaxnreg ptxas could not leave as
//! they are (its messages C75xx), is a warning, with `LOWRANK_CUDA_DENY_SPILLS` an error.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const SOURCES: [&str; 8] =
    ["attention", "cross_entropy", "elementwise", "gemm", "norm", "optimizer", "quant", "table"];

/// Chips that kernels are compiled for; `LOWRANK_CUDA_CHIPS` names others, as in `80,90a`. Without the letter code also
/// runs on later chips of the same number (sm_103, sm_121); Hopper's kernels need theirs.
const CHIPS: &str = "80,86,89,90a,100,120";

/// The virtual chip whose code later chips compile when it is loaded; left out where `LOWRANK_CUDA_CHIPS` is set.
const VIRTUAL_CHIP: &str = "80";

/// Kernels that may spill registers: 124 bytes on sm_120, where heads of 256 elements are rare; some of the totals, which
/// are touched four times a tile.
const MAY_SPILL: [&str; 2] = ["attention_bf16_256", "gemm_hopper_codes4_192_nn"];

fn main() {
    println!("cargo::rerun-if-changed=cpu");
    println!("cargo::rerun-if-changed=build.rs");
    compile("scalar", &[], &[]);
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        let avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"];
        compile("avx2", &["-mavx2", "-mfma", "-mf16c"], &["LOWRANK_AVX2"]);
        compile("avx512", &avx512, &["LOWRANK_AVX512"]);
        let with_bf16: Vec<&str> = avx512.into_iter().chain(["-mavx512bf16"]).collect();
        compile("avx512bf16", &with_bf16, &["LOWRANK_AVX512", "LOWRANK_AVX512BF16"]);
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        pack_cuda_kernels();
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

/// The files of a folder, not of those in it.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    files.sort();
    files
}

/// Writes `kernels.pack`: for each source a fat binary behind its length; nothing where there is no nvcc.
fn pack_cuda_kernels() {
    for variable in ["NVCC", "CUDA_HOME", "LOWRANK_CUDA_CHIPS", "LOWRANK_CUDA_DENY_SPILLS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut pack = Vec::new();
    if let Some(nvcc) = find_nvcc() {
        println!("cargo::rerun-if-changed=cuda");
        pack.extend(b"LRKERNEL");
        let sources = files(Path::new("cuda"));
        for source in sources.iter().filter(|path| path.extension().is_some_and(|e| e == "cu")) {
            let image = fat_binary(&nvcc, source, &out);
            pack.extend((image.len() as u64).to_le_bytes());
            pack.extend(image);
        }
    }
    fs::write(out.join("kernels.pack"), pack).expect("OUT_DIR can be written");
}

/// nvcc of `NVCC`, `CUDA_HOME`, `PATH`, or the folder that `tools/get_nvcc.sh` fills.
fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC") {
        return Some(nvcc.into());
    }
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>());
    // A file that is missing would make every build run this script again; get_nvcc.sh touches build.rs instead.
    let folders = home.into_iter().chain(path.into_iter().flatten()).chain(["target/nvcc/bin".into()]);
    folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}

/// The fat binary of one source, compiled only when the source, a header or the compiler's flags have changed.
fn fat_binary(nvcc: &Path, source: &Path, out: &Path) -> Vec<u8> {
    let mut arguments: Vec<String> = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "-fatbin",
        "--compress-mode=size",
        "--threads=0",
        "-Xptxas=-warn-spills",
    ]
    .map(String::from)
    .to_vec();
    let chosen = env::var("LOWRANK_CUDA_CHIPS").ok();
    for chip in chosen.as_deref().unwrap_or(CHIPS).split(',') {
        arguments.push(format!("-gencode=arch=compute_{chip},code=sm_{chip}"));
    }
    if chosen.is_none() {
        arguments.push(format!("-gencode=arch=compute_{VIRTUAL_CHIP},code=compute_{VIRTUAL_CHIP}"));
    }
    let name = source.file_stem().expect("sources have names").to_string_lossy();
    let (image, made_from) = (out.join(format!("{name}.fatbin")), out.join(format!("{name}.inputs")));
    let mut inputs = format!("{} {}\n", nvcc.display(), arguments.join(" ")).into_bytes();
    for file in files(Path::new("cuda")) {
        if file == source || file.extension().is_some_and(|e| e != "cu") {
            inputs.extend(fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display())));
        }
    }
    if fs::read(&made_from).is_ok_and(|old| old == inputs)
        && let Ok(image) = fs::read(&image)
    {
        return image;
    }
    let done = Command::new(nvcc).args(&arguments).arg("-o").arg(&image).arg(source).output();
    let done = done.unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
    let message = String::from_utf8_lossy(&done.stderr);
    let denied = env::var_os("LOWRANK_CUDA_DENY_SPILLS").is_some();
    for line in message.lines().filter(|line| line.contains("spill") || line.contains("(C75")) {
        if !MAY_SPILL.iter().any(|kernel| line.contains(&format!("'{kernel}'"))) {
            assert!(!denied, "{name}.cu: {line}");
            println!("cargo::warning={name}.cu: {line}");
        }
    }
    if !done.status.success() {
        panic!("{}: nvcc failed:\n{message}", source.display());
    }
    fs::write(&made_from, inputs).expect("OUT_DIR can be written");
    fs::read(&image).unwrap_or_else(|e| panic!("{}: {e}", image.display()))
}
