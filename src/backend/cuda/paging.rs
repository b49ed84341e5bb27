//! Pages of optimizer state in pinned host memory: they visit the device by way of slots there, fetched ahead and stored
//! while other pages are updated. Copies in each direction have a stream of their own.

use super::Cuda;
use super::executor::{Event, Executor, Stream};
use super::staging::Pinned;
use crate::arena::Arena;
use crate::backend::{Kernels, PAGES_AHEAD};
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
    next: usize,
    /// In the stream out, behind the last page that was stored.
    stored: Event,
}

#[derive(Debug)]
struct Slot {
    memory: Tensor, // u8
    fetched: Event,
    updated: Event,
}

impl Paging {
    pub fn new(executor: &Arc<dyn Executor>) -> Result<Self> {
        let home = Arena::of_host(Arc::new(Pinned(executor.clone())));
        Ok(Paging { home, slots: Vec::new(), next: 0, stored: executor.event()? })
    }

    /// Zeros in pinned memory.
    pub fn memory(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        let mut page = Tensor::from_block(self.home.allocate(bytes)?, shape, dtype)?;
        // SAFETY: the new tensor has so many bytes, and nobody else has it.
        unsafe { page.host_bytes_mut()?.write_bytes(0, page.bytes()) };
        Ok(page)
    }

    /// Waits until what was stored is in the host's memory.
    pub fn settle(&self, executor: &dyn Executor) -> Result<()> {
        executor.synchronize(self.stored)
    }

    fn slot(&self, here: &[Tensor]) -> Result<Option<&Slot>> {
        let Some(first) = here.first() else { return Ok(None) };
        for slot in &self.slots {
            if slot.memory.device_bytes()? == first.device_bytes()? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
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
    let (executor, next) = (&*cuda.executor, paging.next);
    paging.next = (next + 1) % PAGES_AHEAD;
    if paging.slots.get(next).is_none_or(|slot| slot.memory.bytes() < bytes) {
        cuda.queue.finish()?; // what is on its way uses the old memory
        paging.slots.truncate(next);
        let slot = Slot {
            memory: cuda.empty(&[bytes], DType::U8)?,
            fetched: executor.event()?,
            updated: executor.event()?,
        };
        // The new memory is there in the order of the computations.
        executor.record(slot.updated, Stream::Compute)?;
        executor.wait(Stream::In, slot.updated)?;
        paging.slots.push(slot);
    }
    let slot = &paging.slots[next];
    // The last page stored was the slot's, and the page itself was stored before it.
    executor.wait(Stream::In, paging.stored)?;
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
    cuda.executor.wait(Stream::Compute, slot.fetched)
}

pub(super) fn store(cuda: &Cuda, page: &[Tensor], here: &[Tensor]) -> Result<()> {
    let paging = cuda.paging();
    let Some(slot) = paging.slot(here)? else { return Ok(()) };
    let executor = &*cuda.executor;
    cuda.queue.flush()?;
    executor.record(slot.updated, Stream::Compute)?;
    executor.wait(Stream::Out, slot.updated)?;
    for (part, here) in page.iter().zip(here) {
        let to = part.clone().host_bytes_mut()?;
        // SAFETY: both have so many bytes; the page is in pinned memory, where the host looks only after `settle`.
        unsafe { executor.copy(Stream::Out, to, here.device_bytes()?, part.bytes())? };
    }
    executor.record(paging.stored, Stream::Out)
}
