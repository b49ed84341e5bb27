//! Memory for a step's tensors.
//!
//! Every shape of a training step is known and repeats, so blocks are kept by size class and handed out
//! again; a tensor gives its block back when its last handle is dropped. Freed blocks are kept only as far
//! as the footprint stays within the largest live set seen and a little more, so the process hardly holds more than its
//! peak.

use crate::error::{Error, Result};
use memmap2::MmapMut;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Alignment of every block, in bytes: a cache line and the widest SIMD register.
pub const ALIGNMENT: usize = 64;

/// Blocks from this size on come straight from the system and go straight back to it.
const MAP_THRESHOLD: usize = 256 * 1024;

/// What an arena may hold above its peak: the small blocks of a decoded token's hundreds of operations, whose sizes take
/// turns, would else be freed and allocated again and again.
const SLACK: usize = 1 << 20;

/// Where an arena gets its memory, if not from the system's allocator: a device's, or the host's that devices copy from.
pub trait MemorySource: Send + Sync + std::fmt::Debug {
    /// The address of `bytes` new bytes, aligned to 256.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when there is none.
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>>;

    /// Takes back what [`MemorySource::allocate`] gave.
    fn free(&self, pointer: NonNull<u8>);
}

/// A block allocator with counters; cheap to clone, shared by all tensors of a backend.
#[derive(Clone, Debug, Default)]
pub struct Arena {
    inner: Arc<Mutex<Pool>>,
}

#[derive(Debug, Default)]
struct Pool {
    free: BTreeMap<usize, Vec<Memory>>, // class size -> blocks
    live: usize,
    cached: usize,
    peak: usize,
    counting: bool,
    on_device: bool,
    source: Option<Arc<dyn MemorySource>>, // none: the system's
}

#[derive(Debug)]
enum Memory {
    Heap(NonNull<u8>, usize),
    Map(MmapMut),
    From(NonNull<u8>, Arc<dyn MemorySource>),
}

// SAFETY: the pointer is uniquely owned by this value, as a `Box<[u8]>` would own it.
unsafe impl Send for Memory {}

impl Memory {
    fn new(size: usize) -> Result<Self> {
        let fail = || Error::OutOfMemory {
            bytes: size,
            what: "a tensor".into(),
            advice: "use a smaller batch, a shorter --max-length or --gradient-checkpointing".into(),
        };
        if size >= MAP_THRESHOLD {
            let map = MmapMut::map_anon(size).map_err(|_| fail())?;
            #[cfg(target_os = "linux")]
            if size >= 4 << 20 {
                let _ = map.advise(memmap2::Advice::HugePage);
            }
            return Ok(Memory::Map(map));
        }
        let layout = std::alloc::Layout::from_size_align(size, ALIGNMENT).map_err(|_| fail())?;
        // SAFETY: the layout has a non-zero size (size classes start at ALIGNMENT).
        let pointer = unsafe { std::alloc::alloc_zeroed(layout) };
        NonNull::new(pointer).map(|p| Memory::Heap(p, size)).ok_or_else(fail)
    }

    fn pointer(&mut self) -> NonNull<u8> {
        match self {
            Memory::Heap(p, _) | Memory::From(p, _) => *p,
            Memory::Map(m) => NonNull::new(m.as_mut_ptr()).expect("a map is never at address zero"),
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self {
            // SAFETY: the pointer came from `alloc_zeroed` with this very layout.
            Memory::Heap(p, size) => unsafe {
                std::alloc::dealloc(
                    p.as_ptr(),
                    std::alloc::Layout::from_size_align_unchecked(*size, ALIGNMENT),
                )
            },
            Memory::Map(_) => {}
            Memory::From(p, source) => source.free(*p),
        }
    }
}

/// What has the alignment of a block.
#[repr(align(64))]
struct Aligned;

/// Rounds a size up to its class: steps of an eighth of a power of two, so at most an eighth is lost.
fn class_of(bytes: usize) -> usize {
    let bytes = bytes.max(ALIGNMENT);
    let step = (bytes.next_power_of_two() / 16).max(ALIGNMENT);
    bytes.div_ceil(step) * step
}

impl Arena {
    /// An empty arena.
    pub fn new() -> Self {
        Self::default()
    }

    /// An arena whose blocks have a size but no memory, to find out what a run would need. Nothing may be read from
    /// or written to them.
    pub(crate) fn counting() -> Self {
        Arena { inner: Arc::new(Mutex::new(Pool { counting: true, ..Pool::default() })) }
    }

    /// An arena of a device's memory.
    pub fn on_device(source: Arc<dyn MemorySource>) -> Self {
        let pool = Pool { source: Some(source), on_device: true, ..Pool::default() };
        Arena { inner: Arc::new(Mutex::new(pool)) }
    }

    /// An arena of memory of the host that comes from elsewhere than the system's allocator.
    #[cfg(feature = "cuda")]
    pub(crate) fn of_host(source: Arc<dyn MemorySource>) -> Self {
        Arena { inner: Arc::new(Mutex::new(Pool { source: Some(source), ..Pool::default() })) }
    }

    /// [`Arena::counting`] for a device's memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn counting_on_device() -> Self {
        let pool = Pool { counting: true, on_device: true, ..Pool::default() };
        Arena { inner: Arc::new(Mutex::new(pool)) }
    }

    /// Whether it only counts.
    pub(crate) fn is_counting(&self) -> bool {
        self.inner.lock().expect("never held across a panic").counting
    }

    /// A block of a counting arena for a mapped file's tensor, which has just its bytes.
    ///
    /// # Errors
    /// When the arena has memory.
    pub(crate) fn count_mapped(&self, bytes: usize) -> Result<Block> {
        let mut pool = self.inner.lock().expect("the arena's lock is never held across a panic");
        if !pool.counting {
            return Err(Error::Unsupported("an arena with memory holds no file's tensors".into()));
        }
        Ok(pool.count(bytes, self))
    }

    /// A block of at least `bytes` bytes, aligned to [`ALIGNMENT`]; its content is unspecified.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the system gives none.
    pub fn allocate(&self, bytes: usize) -> Result<Block> {
        let size = class_of(bytes);
        let mut pool = self.inner.lock().expect("the arena's lock is never held across a panic");
        if pool.counting {
            return Ok(pool.count(size, self));
        }
        let reused = pool.free.get_mut(&size).and_then(Vec::pop);
        let mut memory = match reused {
            Some(memory) => {
                pool.cached -= size;
                memory
            }
            None => {
                let keep = (pool.peak + SLACK).saturating_sub(pool.live + size);
                pool.trim(keep);
                match &pool.source {
                    Some(source) => Memory::From(source.allocate(size)?, source.clone()),
                    None => Memory::new(size)?,
                }
            }
        };
        pool.live += size;
        pool.peak = pool.peak.max(pool.live);
        let pointer = memory.pointer();
        Ok(Block { memory: Some(memory), pointer, size, on_device: pool.on_device, arena: self.clone() })
    }

    /// Bytes in use by tensors now.
    pub fn live_bytes(&self) -> usize {
        self.inner.lock().expect("the arena's lock is never held across a panic").live
    }

    /// The largest [`Arena::live_bytes`] so far (or since [`Arena::reset_peak`]).
    pub fn peak_bytes(&self) -> usize {
        self.inner.lock().expect("the arena's lock is never held across a panic").peak
    }

    /// Starts a new measurement of the peak and gives unused blocks back to the system.
    pub fn reset_peak(&self) {
        let mut pool = self.inner.lock().expect("the arena's lock is never held across a panic");
        pool.trim(0);
        pool.peak = pool.live;
    }
}

impl Pool {
    /// A block without memory.
    fn count(&mut self, size: usize, arena: &Arena) -> Block {
        self.live += size;
        self.peak = self.peak.max(self.live);
        let pointer = NonNull::<Aligned>::dangling().cast();
        Block { memory: None, pointer, size, on_device: self.on_device, arena: arena.clone() }
    }

    /// Frees cached blocks, largest first, until at most `keep` bytes are cached.
    fn trim(&mut self, keep: usize) {
        while self.cached > keep {
            let Some(mut entry) = self.free.last_entry() else { return };
            let size = *entry.key();
            match entry.get_mut().pop() {
                Some(_) => self.cached -= size,
                None => {
                    entry.remove();
                }
            }
        }
    }
}

/// A block of an [`Arena`]; it returns there when dropped.
#[derive(Debug)]
pub struct Block {
    memory: Option<Memory>, // none in a counting arena
    pointer: NonNull<u8>,
    size: usize,
    on_device: bool,
    arena: Arena,
}

// SAFETY: a block owns its memory; who may write when is decided by the tensors that share it.
unsafe impl Send for Block {}
// SAFETY: as above; the block itself is never changed through a shared reference.
unsafe impl Sync for Block {}

impl Block {
    /// Address of the first byte.
    pub(crate) fn pointer(&self) -> NonNull<u8> {
        self.pointer
    }

    /// Whether the memory is a device's, which the host can't read.
    pub fn is_on_device(&self) -> bool {
        self.on_device
    }

    /// Usable size in bytes.
    pub fn size(&self) -> usize {
        self.size
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let Ok(mut pool) = self.arena.inner.lock() else { return };
        pool.live -= self.size;
        if let Some(memory) = self.memory.take() {
            pool.free.entry(self.size).or_default().push(memory);
            pool.cached += self.size;
            let keep = pool.peak + SLACK - pool.live;
            pool.trim(keep);
        }
    }
}

/// Gives the heap's free pages back to the system, where its allocator can: to be called when much was freed, such as a
/// tokenizer, before much is needed.
pub fn release_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: the C library's own function; it touches only memory that nobody has.
        unsafe { malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_lose_at_most_an_eighth_and_blocks_are_reused() {
        for bytes in [1, 64, 65, 1000, 4097, 1 << 20, (1 << 20) + 1] {
            let class = class_of(bytes);
            assert!(class >= bytes && (class - bytes) * 8 <= class.max(1024), "{bytes} -> {class}");
        }
        let arena = Arena::new();
        let first = arena.allocate(1 << 20).unwrap();
        let address = first.pointer();
        drop(first);
        assert_eq!(arena.allocate(1 << 20).unwrap().pointer(), address);
        assert_eq!(arena.live_bytes(), 0);
        assert_eq!(arena.peak_bytes(), 1 << 20);
    }

    #[test]
    fn what_is_held_hardly_exceeds_the_peak() {
        let arena = Arena::new();
        drop(arena.allocate(8 << 20).unwrap());
        let small: Vec<_> = (0..7).map(|_| arena.allocate(1 << 20).unwrap()).collect();
        let pool = arena.inner.lock().unwrap();
        assert!(pool.live + pool.cached <= pool.peak + SLACK);
        drop(pool);
        drop(small);
    }
}
