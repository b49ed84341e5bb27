//! A tensor is a plain handle: storage, offset, shape, type. Contiguous, row-major, cheap to clone.
//!
//! There are no locks and no strides. Two handles may look at the same memory (a row range of a larger
//! tensor, a slice of the flat parameter buffer); whoever writes takes `&mut Tensor`, and operations run in
//! program order, so a kernel never reads what another one writes at the same time.

use crate::arena::{Arena, Block};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use memmap2::{Mmap, MmapRaw};
use std::ops::Range;
use std::sync::Arc;

/// Up to four dimensions, outermost first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; 4],
    rank: u8,
}

impl Shape {
    /// The shape with these dimensions (at most four).
    pub fn new(dims: &[usize]) -> Self {
        assert!(dims.len() <= 4, "a shape has at most four dimensions, found {dims:?}");
        let mut all = [1; 4];
        all[..dims.len()].copy_from_slice(dims);
        Shape { dims: all, rank: dims.len() as u8 }
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank as usize]
    }

    /// Product of the dimensions.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.dims())
    }
}

/// Where a tensor's bytes are.
#[derive(Debug)]
pub enum Storage {
    /// Host memory of an arena.
    Host(Block),
    /// Memory of a device's arena, whose addresses mean nothing on the host.
    Device(Block),
    /// A read-only memory-mapped file, as checkpoints are.
    Mapped(Arc<Mmap>),
    /// A memory-mapped file that is written: pages of optimizer state that memory has no room for.
    Paged(Arc<MmapRaw>),
}

/// A contiguous row-major tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    storage: Arc<Storage>,
    offset: usize, // bytes
    shape: Shape,
    dtype: DType,
}

impl Tensor {
    /// A tensor over the start of an arena's block.
    ///
    /// # Errors
    /// When the block is too small.
    pub fn from_block(block: Block, shape: &[usize], dtype: DType) -> Result<Self> {
        let shape = Shape::new(shape);
        let bytes = shape.elements() * dtype.size();
        if bytes > block.size() {
            return Err(Error::shape(
                "tensor",
                format!("{shape:?} {dtype} needs {bytes} bytes, the block has {}", block.size()),
            ));
        }
        let storage = if block.is_on_device() { Storage::Device(block) } else { Storage::Host(block) };
        Ok(Tensor { storage: Arc::new(storage), offset: 0, shape, dtype })
    }

    /// A read-only tensor over `bytes` of a memory-mapped file; a copy of them if they are not aligned, as
    /// in files that the first safetensors versions wrote.
    ///
    /// # Errors
    /// When the range leaves the file, or its length does not fit shape and type, or memory can't be had.
    pub fn from_mapped(map: Arc<Mmap>, bytes: Range<usize>, shape: &[usize], dtype: DType) -> Result<Self> {
        let shape = Shape::new(shape);
        if bytes.end > map.len() || bytes.len() != shape.elements() * dtype.size() {
            return Err(Error::shape(
                "tensor",
                format!("bytes {bytes:?} of a file of {} do not hold {shape:?} {dtype}", map.len()),
            ));
        }
        if !bytes.start.is_multiple_of(dtype.size()) {
            let mut copy = Tensor::from_block(Arena::new().allocate(bytes.len())?, shape.dims(), dtype)?;
            let to = copy.host_bytes_mut()?;
            // SAFETY: the range lies in the map, as checked above; the new block holds as many bytes and
            // nobody else has it.
            unsafe { map[bytes.clone()].as_ptr().copy_to_nonoverlapping(to, bytes.len()) };
            return Ok(copy);
        }
        Ok(Tensor { storage: Arc::new(Storage::Mapped(map)), offset: bytes.start, shape, dtype })
    }

    /// A tensor over a file that is mapped for writing, from a byte offset that is a multiple of the type's
    /// size. Nobody else may write there.
    ///
    /// # Errors
    /// When it does not lie in the file.
    pub(crate) fn from_paged(
        map: Arc<MmapRaw>,
        offset: usize,
        shape: &[usize],
        dtype: DType,
    ) -> Result<Self> {
        let shape = Shape::new(shape);
        let bytes = shape.elements() * dtype.size();
        if !offset.is_multiple_of(dtype.size()) || offset + bytes > map.len() {
            return Err(Error::shape(
                "tensor",
                format!("{shape:?} {dtype} at byte {offset} of a file of {}", map.len()),
            ));
        }
        Ok(Tensor { storage: Arc::new(Storage::Paged(map)), offset, shape, dtype })
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.elements() * self.dtype.size()
    }

    /// Bytes of the storage that the tensor lies in, which may be more than its own.
    pub fn capacity(&self) -> usize {
        match &*self.storage {
            Storage::Host(block) | Storage::Device(block) => block.size(),
            Storage::Mapped(map) => map.len(),
            Storage::Paged(map) => map.len(),
        }
    }

    /// The last dimension (1 for a scalar).
    pub fn cols(&self) -> usize {
        self.shape().last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape().split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// Where the bytes are.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Whether no other handle shares this storage, so that it may be overwritten in place.
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    /// Whether both handles look at the same elements.
    pub(crate) fn is_same(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage) && self.offset == other.offset && self.shape == other.shape
    }

    /// Whether the tensor lies in a read-only file.
    pub fn is_mapped(&self) -> bool {
        matches!(*self.storage, Storage::Mapped(_))
    }

    /// Whether the tensor lies in a device's memory.
    pub fn is_on_device(&self) -> bool {
        matches!(*self.storage, Storage::Device(_))
    }

    /// Tells the system that the pages of a mapped tensor are not needed soon; they are read again on use.
    pub fn release_pages(&self) {
        #[cfg(unix)]
        match &*self.storage {
            Storage::Host(_) | Storage::Device(_) => {}
            Storage::Mapped(map) => {
                // SAFETY: the map is read-only and file-backed: dropped pages come back from the file.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.offset, self.bytes())
                };
            }
            Storage::Paged(map) => {
                let _ = map.flush_async_range(self.offset, self.bytes());
                // SAFETY: the map is shared and file-backed: what was written is the file's before the pages go.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.offset, self.bytes())
                };
            }
        }
    }

    /// Asks the system to bring a paged tensor into memory, without waiting.
    pub fn fetch_pages(&self) {
        #[cfg(unix)]
        if let Storage::Paged(map) = &*self.storage {
            let _ = map.advise_range(memmap2::Advice::WillNeed, self.offset, self.bytes());
        }
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let new = Shape::new(shape);
        if new.elements() != self.elements() {
            return Err(Error::shape(
                "reshape",
                format!("{:?} has not as many elements as {new:?}", self.shape),
            ));
        }
        Ok(Tensor { shape: new, ..self.clone() })
    }

    /// The same bytes as elements of another type.
    ///
    /// # Errors
    /// When the number of bytes differs, or the first is not where elements of that type may be.
    #[cfg(feature = "cuda")]
    pub(crate) fn seen_as(&self, shape: &[usize], dtype: DType) -> Result<Self> {
        let new = Shape::new(shape);
        if new.elements() * dtype.size() != self.bytes() || !self.offset.is_multiple_of(dtype.size()) {
            return Err(Error::shape(
                "tensor",
                format!("{:?} {} as {new:?} {dtype}", self.shape, self.dtype),
            ));
        }
        Ok(Tensor { shape: new, dtype, ..self.clone() })
    }

    /// Rows `range` of the first dimension, sharing the storage.
    ///
    /// # Errors
    /// When the range leaves the tensor or there is no first dimension.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        let Some((&first, rest)) = self.shape().split_first() else {
            return Err(Error::shape("slice", "a scalar has no rows"));
        };
        if range.start > range.end || range.end > first {
            return Err(Error::shape("slice", format!("rows {range:?} of a tensor with {first}")));
        }
        let stride = rest.iter().product::<usize>() * self.dtype.size();
        let mut dims = [1; 4];
        dims[0] = range.len();
        dims[1..=rest.len()].copy_from_slice(rest);
        Ok(Tensor {
            storage: self.storage.clone(),
            offset: self.offset + range.start * stride,
            shape: Shape::new(&dims[..=rest.len()]),
            dtype: self.dtype,
        })
    }

    /// Address of the first element on the host, for reading.
    ///
    /// # Errors
    /// When the tensor has another type than `T`.
    pub(crate) fn host<T: Element>(&self) -> Result<*const T> {
        self.expect_dtype(T::DTYPE)?;
        Ok(self.host_bytes().cast())
    }

    /// Address of the first element on the host, for writing.
    ///
    /// # Errors
    /// When the tensor has another type than `T` or lies in a read-only file.
    pub(crate) fn host_mut<T: Element>(&mut self) -> Result<*mut T> {
        self.expect_dtype(T::DTYPE)?;
        Ok(self.host_bytes_mut()?.cast())
    }

    /// Address of the first byte on the device.
    ///
    /// # Errors
    /// When the tensor lies elsewhere.
    #[cfg(feature = "cuda")]
    pub(crate) fn device_bytes(&self) -> Result<*mut u8> {
        match &*self.storage {
            Storage::Device(block) => Ok(block.pointer().as_ptr().wrapping_add(self.offset)),
            _ => {
                Err(Error::shape("device", "expected a tensor in the device's memory, found one of the host"))
            }
        }
    }

    /// Address of the first byte on the host, for reading.
    ///
    /// # Panics
    /// When the tensor lies in a device's memory: a tensor of one backend was given to another.
    pub(crate) fn host_bytes(&self) -> *const u8 {
        let base = match &*self.storage {
            Storage::Device(_) => panic!("a tensor in a device's memory was given to a backend of the host"),
            Storage::Host(block) => block.pointer().as_ptr().cast_const(),
            Storage::Mapped(map) => map.as_ptr(),
            Storage::Paged(map) => map.as_ptr(),
        };
        // SAFETY: every constructor checked that offset and length stay within the storage.
        unsafe { base.add(self.offset) }
    }

    /// Address of the first byte on the host, for writing.
    ///
    /// # Errors
    /// When the tensor lies in a read-only file.
    pub(crate) fn host_bytes_mut(&mut self) -> Result<*mut u8> {
        match &*self.storage {
            // SAFETY: every constructor checked that offset and length stay within the storage.
            Storage::Host(block) => Ok(unsafe { block.pointer().as_ptr().add(self.offset) }),
            // SAFETY: as above; the map is made for writing.
            Storage::Paged(map) => Ok(unsafe { map.as_mut_ptr().add(self.offset) }),
            Storage::Mapped(_) => Err(Error::shape("write", "a tensor of a memory-mapped file is read-only")),
            Storage::Device(_) => {
                Err(Error::shape("write", "a tensor in a device's memory was given to the host"))
            }
        }
    }

    fn expect_dtype(&self, dtype: DType) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(Error::shape("tensor", format!("expected {dtype}, found {}", self.dtype)))
    }
}
