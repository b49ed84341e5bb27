//! Pages of optimizer state in pinned host memory: they visit the device by way of slots there, fetched ahead and stored
//! while other pages are updated. Copies in each direction have a stream of their own.

use super::Cuda;
use super::executor::{Event, Executor, Stream};
use super::staging::Pinned;
use crate::arena::Arena;
use crate::backend::Kernels;
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::Tensor;
use std::sync::Arc;

/// Where parts of a page begin on the device.
const PART_ALIGNMENT: usize = 256;

/// The slots, and where pages live.
#[derive(Debug)]
pub(super) struct Paging {
    home: Arena,
    slots: Vec<Slot>,
    /// In the stream out, behind the last page that was stored.
    stored: Event,
    /// Events of marks that nobody has.
    marks: Vec<Event>,
}

/// A place for a page on the device, free when nobody else has a handle to its memory.
#[derive(Debug)]
struct Slot {
    memory: Tensor, // u8
    fetched: Event,
    updated: Event,
}

impl Paging {
    pub fn new(executor: &Arc<dyn Executor>) -> Result<Self> {
        let home = Arena::of_host(Arc::new(Pinned(executor.clone())));
        Ok(Paging { home, slots: Vec::new(), stored: executor.event()?, marks: Vec::new() })
    }

    /// Zeros in pinned memory.
    pub fn memory(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let mut page = Tensor::from_block(self.home.allocate(bytes)?, shape, dtype)?;
        // SAFETY: the new tensor has so many bytes, and nobody else has it.
        unsafe { page.host_bytes_mut()?.write_bytes(0, page.bytes()) };
        Ok(page)
    }

    /// Waits until pages in pinned memory are whole and nobody reads them.
    pub fn settle(&self, executor: &dyn Executor) -> Result<()> {
        self.slots.iter().try_for_each(|slot| executor.synchronize(slot.fetched))?;
        executor.synchronize(self.stored)
    }

    /// An event for a mark.
    pub fn take_mark(&mut self, executor: &dyn Executor) -> Result<Event> {
        self.marks.pop().map_or_else(|| executor.event(), Ok)
    }

    /// Takes marks' events back, of which it gives the last: whoever waits for it waits for it as it was recorded.
    pub fn give_marks(&mut self, marks: Vec<Event>) -> Option<Event> {
        let last = marks.last().copied();
        self.marks.extend(marks);
        last
    }

    /// The slot that a page came to.
    fn slot(&self, here: &[Tensor]) -> Result<Option<&Slot>> {
        let Some(first) = here.first() else { return Ok(None) };
        for slot in &self.slots {
            if slot.memory.device_bytes()? == first.device_bytes()? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// A free slot of so many bytes; a new one in the place of a smaller one, or beside the others.
    fn free_slot(&mut self, cuda: &Cuda, bytes: usize) -> Result<&Slot> {
        let executor = &*cuda.executor;
        let is_free = |slot: &Slot| slot.memory.is_unique();
        let serves = |slot: &Slot| is_free(slot) && slot.memory.bytes() >= bytes;
        if let Some(found) = self.slots.iter().position(serves) {
            return Ok(&self.slots[found]);
        }
        if let Some(small) = self.slots.iter().position(is_free) {
            cuda.queue.finish()?; // what is on its way uses the old memory
            self.slots.remove(small);
        }
        let slot = Slot {
            memory: cuda.empty(&[bytes], DType::U8)?,
            fetched: executor.event()?,
            updated: executor.event()?,
        };
        // The new memory is there in the order of the computations.
        cuda.queue.flush()?;
        executor.record(slot.updated, Stream::Compute)?;
        executor.wait(Stream::In, slot.updated)?;
        self.slots.push(slot);
        Ok(self.slots.last().expect("it was just added"))
    }
}

/// Whether a page lives where it is used.
fn is_resident(page: &[Tensor]) -> bool {
    page.iter().all(Tensor::is_on_device)
}

pub(super) fn fetch(cuda: &Cuda, page: &[Tensor]) -> Result<Vec<Tensor>> {
    if is_resident(page) {
        return Ok(page.to_vec());
    }
    let bytes = page.iter().map(|part| part.bytes().next_multiple_of(PART_ALIGNMENT)).sum();
    let mut paging = cuda.paging();
    let (executor, stored) = (&*cuda.executor, paging.stored);
    let slot = paging.free_slot(cuda, bytes)?;
    // What the slot had before was stored until then, and the page itself.
    executor.wait(Stream::In, stored)?;
    let mut here = Vec::with_capacity(page.len());
    let mut start = 0;
    for part in page {
        let tensor = slot.memory.slice(start..start + part.bytes())?.seen_as(part.shape(), part.dtype())?;
        // SAFETY: both have so many bytes; the page is in pinned memory, which is not written before it is stored.
        unsafe { executor.copy(Stream::In, tensor.device_bytes()?, part.host_bytes(), part.bytes())? };
        start += part.bytes().next_multiple_of(PART_ALIGNMENT);
        here.push(tensor);
    }
    executor.record(slot.fetched, Stream::In)?;
    Ok(here)
}

pub(super) fn begin(cuda: &Cuda, here: &[Tensor]) -> Result<()> {
    let paging = cuda.paging();
    let Some(slot) = paging.slot(here)? else { return Ok(()) };
    cuda.queue.flush()?;
    cuda.executor.wait(cuda.queue.stream(), slot.fetched)
}

pub(super) fn store(cuda: &Cuda, page: &[Tensor], here: &[Tensor]) -> Result<()> {
    let paging = cuda.paging();
    let Some(slot) = paging.slot(here)? else { return Ok(()) };
    let executor = &*cuda.executor;
    cuda.queue.flush()?;
    executor.record(slot.updated, cuda.queue.stream())?;
    executor.wait(Stream::Out, slot.updated)?;
    for (part, here) in page.iter().zip(here) {
        let to = part.clone().host_bytes_mut()?;
        // SAFETY: both have so many bytes; the page is in pinned memory, where the host looks only after `settle`.
        unsafe { executor.copy(Stream::Out, to, here.device_bytes()?, part.bytes())? };
    }
    executor.record(paging.stored, Stream::Out)
}
