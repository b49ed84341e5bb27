//! CUDA kernels compiled for the host by g++, as a shared library with the C interface of `cuda/host/executor.cc`.
#![allow(dead_code)]

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// What goes into a library: kernels, and what is different from the files as they are.
#[derive(Clone, Default)]
pub struct HostKernels {
    /// The `.cu` files.
    pub sources: Vec<PathBuf>,
    /// `NAME` or `NAME=VALUE`.
    pub defines: Vec<String>,
    /// File names of sources or of headers in `cuda/`, and the text to take instead.
    pub replacements: Vec<(String, String)>,
}

/// The project's kernels, `cuda/*.cu`.
pub fn project_kernels() -> HostKernels {
    HostKernels { sources: files(&root().join("cuda"), &["cu"]), ..Default::default() }
}

/// Their library.
pub fn project_library() -> PathBuf {
    project_kernels().build().unwrap()
}

impl HostKernels {
    /// The path of the library, which is compiled if there is none of the same sources, headers and flags.
    /// Else what the compiler said. Tests and test processes may ask at the same time.
    pub fn build(&self) -> Result<PathBuf, String> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _here = ONE_AT_A_TIME.lock().unwrap_or_else(|e| e.into_inner());
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host_kernels");
        fs::create_dir_all(&cache).unwrap();
        let compiler = Compiler::new();
        let headers = self.headers();
        let mut everything = DefaultHasher::new();
        (&compiler.command, &self.defines, &headers).hash(&mut everything);
        // An object depends on its source and on every header.
        let executor = files(&root().join("cuda/host"), &["cc"]);
        let mut objects = Vec::new();
        for source in executor.iter().chain(&self.sources) {
            let text = self.text(source);
            let mut hash = everything.clone();
            (name(source), &text).hash(&mut hash);
            objects.push((source, text, cache.join(format!("{}-{:016x}.o", name(source), hash.finish()))));
        }
        objects.iter().for_each(|(_, _, object)| object.hash(&mut everything));
        let library = cache.join(format!("kernels-{:016x}.so", everything.finish()));
        if library.exists() {
            return Ok(library);
        }
        let _all = LockFile::take(cache.join("lock"));
        let folder = tempfile::tempdir_in(&cache).unwrap();
        write_all(folder.path(), &headers);
        let jobs: Vec<_> = objects.iter().filter(|(_, _, object)| !object.exists()).collect();
        let next = AtomicUsize::new(0);
        let errors = Mutex::new(String::new());
        let work = || {
            while let Some((source, text, object)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                // Sources lie beside the headers, as they do in cuda/.
                let inside = source.strip_prefix(root().join("cuda")).unwrap_or(Path::new(name(source)));
                write_all(folder.path(), &[(inside.to_owned(), text.clone())]);
                if let Err(message) = compiler.compile(folder.path(), inside, &self.defines, object) {
                    errors.lock().unwrap().push_str(&message);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(2) {
                scope.spawn(work);
            }
        });
        let errors = errors.into_inner().unwrap();
        if !errors.is_empty() {
            return Err(errors);
        }
        compiler.link(folder.path(), objects.iter().map(|(_, _, object)| object), &library)?;
        Ok(library)
    }

    /// Every header under `cuda/`, by its path there.
    fn headers(&self) -> Vec<(PathBuf, String)> {
        let cuda = root().join("cuda");
        let mut paths = files(&cuda, &["h", "cuh"]);
        paths.extend(files(&cuda.join("host"), &["h", "cuh"]));
        paths.iter().map(|p| (p.strip_prefix(&cuda).unwrap().to_owned(), self.text(p))).collect()
    }

    fn text(&self, path: &Path) -> String {
        match self.replacements.iter().find(|(replaced, _)| replaced == name(path)) {
            Some((_, text)) => text.clone(),
            None => fs::read_to_string(path).unwrap(),
        }
    }
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn name(path: &Path) -> &str {
    path.file_name().unwrap().to_str().unwrap()
}

/// The files of a folder with one of these extensions, sorted.
fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted)));
    found.sort();
    found
}

fn write_all(folder: &Path, texts: &[(PathBuf, String)]) {
    for (path, text) in texts {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

struct Compiler {
    command: Vec<String>,
}

impl Compiler {
    fn new() -> Self {
        let system = if cfg!(target_os = "macos") { "apple-darwin" } else { "unknown-linux-gnu" };
        let target = format!("{}-{system}", std::env::consts::ARCH);
        let tool = cc::Build::new()
            .cpp(true)
            .cargo_metadata(false)
            .no_default_flags(true)
            .opt_level(2)
            .target(&target)
            .host(&target)
            .get_compiler();
        let mut command = vec![tool.path().to_str().unwrap().to_owned()];
        let flags = "-std=c++17 -O2 -g1 -ffp-contract=off -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing \
                     -pthread -Wall -Wextra -Werror -Wno-unknown-pragmas";
        command.extend(flags.split_whitespace().map(str::to_owned));
        // Without it fmaf is a function call, with the same result.
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("fma") {
            command.push("-mfma".to_owned());
        }
        Self { command }
    }

    fn compile(&self, folder: &Path, source: &Path, defines: &[String], object: &Path) -> Result<(), String> {
        let made = folder.join(name(object));
        let mut command = self.command();
        command.current_dir(folder).args(["-I.", "-include", "host/cuda.h"]);
        command.args(defines.iter().map(|define| format!("-D{define}")));
        if source.extension().is_some_and(|e| e == "cu") {
            // A device refuses vectors that don't lie at multiples of their size; here they trap.
            command.args(["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]);
        }
        command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(&made);
        run(&mut command)?;
        fs::rename(made, object).map_err(|e| e.to_string())
    }

    fn link<'a>(
        &self,
        folder: &Path,
        objects: impl Iterator<Item = &'a PathBuf>,
        library: &Path,
    ) -> Result<(), String> {
        let made = folder.join("library.so");
        run(self.command().args(["-shared", "-o"]).arg(&made).args(objects))?;
        fs::rename(made, library).map_err(|e| e.to_string())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]);
        command
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| {
        format!("can't run {:?}, which compiles kernels for the host: {e}", command.get_program())
    })?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// A file that exists while one process compiles, with its number inside. Whoever is gone doesn't count.
struct LockFile(PathBuf);

impl LockFile {
    fn take(path: PathBuf) -> Self {
        loop {
            let mine = path.with_extension(std::process::id().to_string());
            fs::write(&mine, std::process::id().to_string()).unwrap();
            // A link appears whole, with the number inside, or not at all.
            let linked = fs::hard_link(&mine, &path);
            fs::remove_file(&mine).unwrap();
            if linked.is_ok() {
                return Self(path);
            }
            let owner = fs::read_to_string(&path).unwrap_or_default();
            if cfg!(target_os = "linux") && !owner.is_empty() && !Path::new("/proc").join(owner).exists() {
                // At worst two compile the same: objects and libraries appear whole too.
                let _ = fs::remove_file(&path);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
