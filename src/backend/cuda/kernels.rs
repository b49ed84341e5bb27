//! The kernels' binaries: in the program itself, or in a file that `LOWRANK_CUDA_KERNELS` names.

use crate::error::{Error, Result};
use std::borrow::Cow;
use std::path::Path;

/// What `build.rs` made of `cuda/*.cu`: empty where there was no nvcc.
static BUILT_IN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.pack"));

/// Names a file of kernels to use in place of the program's own.
const VARIABLE: &str = "LOWRANK_CUDA_KERNELS";

/// The first bytes of a pack, which is them, and then for each image its length (u64, little-endian) and its bytes.
const PACK: &[u8; 8] = b"LRKERNEL";

/// The first bytes of a fat binary and of a cubin.
const IMAGES: [&[u8]; 2] = [&[0x50, 0xed, 0x55, 0xba], b"\x7fELF"];

/// Images of kernels: fat binaries or cubins.
pub struct KernelFile {
    name: String,
    images: Vec<Cow<'static, [u8]>>,
}

impl KernelFile {
    /// The file that the environment names, or the program's own kernels.
    ///
    /// # Errors
    /// When there are none, or the file is not one of kernels.
    pub fn find() -> Result<Self> {
        if let Some(path) = std::env::var_os(VARIABLE) {
            let path = Path::new(&path);
            let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
            let images = parse(&bytes).ok_or_else(|| {
                Error::format(path, format!("{VARIABLE}: expected a fat binary, a cubin or a kernels.pack"))
            })?;
            let images = images.into_iter().map(|image| Cow::Owned(image.to_vec())).collect();
            return Ok(KernelFile { name: path.display().to_string(), images });
        }
        if BUILT_IN.is_empty() {
            return Err(Error::device(
                "cuda",
                format!(
                    "this program was built without CUDA kernels, as nvcc was not found; run tools/get_nvcc.sh and \
                     build again, or name a kernels.pack in {VARIABLE}"
                ),
            ));
        }
        let images =
            parse(BUILT_IN).ok_or_else(|| Error::device("cuda", "the program's own kernels are damaged"))?;
        Ok(KernelFile { name: "the program".into(), images: images.into_iter().map(Cow::Borrowed).collect() })
    }

    /// Where they come from.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Each image.
    pub fn images(&self) -> impl Iterator<Item = &[u8]> {
        self.images.iter().map(|image| &**image)
    }
}

/// The images of a file; none if it is malformed.
fn parse(bytes: &[u8]) -> Option<Vec<&[u8]>> {
    if IMAGES.iter().any(|magic| bytes.starts_with(magic)) {
        return Some(vec![bytes]);
    }
    let mut rest = bytes.strip_prefix(PACK)?;
    let mut images = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let image = after.get(..length)?;
        if !IMAGES.iter().any(|magic| image.starts_with(magic)) {
            return None;
        }
        images.push(image);
        rest = &after[length..];
    }
    (!images.is_empty()).then_some(images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packs_are_read_and_damaged_ones_refused() {
        let image = [IMAGES[0], b"rest"].concat();
        assert_eq!(parse(&image).unwrap(), [&image[..]]);
        let mut pack = PACK.to_vec();
        for _ in 0..2 {
            pack.extend((image.len() as u64).to_le_bytes());
            pack.extend(&image);
        }
        assert_eq!(parse(&pack).unwrap(), [&image[..], &image[..]]);
        for end in 0..pack.len() {
            let whole = end == PACK.len() + 8 + image.len();
            assert_eq!(parse(&pack[..end]).is_some(), whole, "{end} bytes");
        }
        let mut absurd = PACK.to_vec();
        absurd.extend(u64::MAX.to_le_bytes());
        assert!(parse(&absurd).is_none());
        assert!(parse(b"").is_none() && parse(b"hello").is_none());
    }
}
