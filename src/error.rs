//! The one error type of the crate.
//!
//! Messages are lowercase, name the file, key, tensor or flag at fault, and say what was expected, what was
//! found and what to do.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What can go wrong. Every variant prints as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file exists but its content is not what its format allows.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What was expected and found.
        message: String,
    },
    /// A key of a configuration (`config.json`, `adapter_config.json`, a flag) has a value that can't be used.
    #[error("{context}: `{key}`: {message}")]
    Config {
        /// The file or the subject that holds the key.
        context: String,
        /// The key.
        key: String,
        /// What was expected and found.
        message: String,
    },
    /// A row of a data file can't be used.
    #[error("{}: row {row}: {message}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// The row, counted from 1.
        row: usize,
        /// What was expected and found.
        message: String,
    },
    /// A tensor is missing, or has another shape or type than expected.
    #[error("tensor `{name}`: {message}")]
    Tensor {
        /// The tensor's name in its file.
        name: String,
        /// What was expected and found.
        message: String,
    },
    /// Shapes or types of an operation's operands do not fit together.
    #[error("{operation}: {message}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// What was expected and found.
        message: String,
    },
    /// Something exists elsewhere but not here; never a silent wrong result.
    #[error("{0}")]
    Unsupported(String),
    /// A loss or a gradient stopped being finite.
    #[error("step {step}: {what} is not finite; {advice}")]
    NotFinite {
        /// The optimizer step, counted from 1.
        step: usize,
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// The last good checkpoint and what to try.
        advice: String,
    },
    /// The user asked to stop; a checkpoint was saved where the message says.
    #[error("stopped: {0}")]
    Interrupted(String),
    /// An accelerator is missing, does not fit, or failed.
    #[error("{device}: {message}")]
    Device {
        /// Which one: `cuda:0`.
        device: String,
        /// What was expected, what happened and what to do.
        message: String,
    },
    /// Memory that was asked for could not be had.
    #[error("out of memory: {bytes} bytes for {what}; {advice}")]
    OutOfMemory {
        /// Size of the request.
        bytes: usize,
        /// What it was for.
        what: String,
        /// What to try.
        advice: String,
    },
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::Io`] for `path`; where its folder is what is wrong, an error that names that.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        let path = path.as_ref();
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        match (source.kind(), folder) {
            (ErrorKind::NotADirectory, Some(folder)) => {
                let file = folder.ancestors().find(|path| path.is_file()).unwrap_or(folder);
                Error::format(file, "expected a folder, found a file")
            }
            (ErrorKind::NotFound, Some(folder)) if !folder.exists() => {
                Error::format(path, format!("not found, as there is no folder {}", folder.display()))
            }
            _ => Error::Io { path: path.to_path_buf(), source },
        }
    }

    /// An [`Error::Format`] for `path`.
    pub fn format(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Format { path: path.as_ref().to_path_buf(), message: message.into() }
    }

    /// An [`Error::Config`] for `key` of `context`.
    pub fn config(context: impl ToString, key: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Config { context: context.to_string(), key: key.into(), message: message.into() }
    }

    /// An [`Error::Data`] for row `row` (counted from 1) of `path`.
    pub fn data(path: impl AsRef<Path>, row: usize, message: impl Into<String>) -> Self {
        Error::Data { path: path.as_ref().to_path_buf(), row, message: message.into() }
    }

    /// An [`Error::Tensor`] for the tensor `name`.
    pub fn tensor(name: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Tensor { name: name.into(), message: message.into() }
    }

    /// An [`Error::Device`] of `device`.
    pub fn device(device: impl Into<String>, message: impl Into<String>) -> Self {
        Error::Device { device: device.into(), message: message.into() }
    }

    /// An [`Error::Shape`] of `operation`.
    pub fn shape(operation: &'static str, message: impl Into<String>) -> Self {
        Error::Shape { operation, message: message.into() }
    }
}
