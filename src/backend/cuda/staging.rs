//! Copies between the host's memory and the device, by way of pinned memory: the device copies by itself from there, so
//! nobody waits for an upload, and a download waits for the computations alone.

use super::executor::{Event, Executor, Stream};
use super::queue::Queue;
use crate::arena::MemorySource;
use crate::error::Result;
use std::ptr::NonNull;
use std::sync::Arc;

/// Bytes of a piece of pinned memory.
const PIECE: usize = 1 << 20;

/// Pieces for uploads: while the device empties some, the host fills the others.
const PIECES: usize = 4;

/// Pinned memory in which an executor can be asked for as for a device's.
#[derive(Debug)]
pub(super) struct Pinned(pub Arc<dyn Executor>);

impl MemorySource for Pinned {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        self.0.allocate_pinned(bytes)
    }

    fn free(&self, pointer: NonNull<u8>) {
        self.0.free_pinned(pointer);
    }
}

/// Pinned memory for what is on its way.
#[derive(Debug)]
pub(super) struct Staging {
    executor: Arc<dyn Executor>,
    pieces: Vec<Piece>,
    current: usize,
    filled: usize, // bytes of the current piece
    down: Piece,
}

#[derive(Debug)]
struct Piece {
    memory: NonNull<u8>,
    /// Reached when its bytes were copied.
    free: Event,
}

// SAFETY: the memory is this value's own.
unsafe impl Send for Piece {}

impl Piece {
    fn new(executor: &dyn Executor) -> Result<Self> {
        let free = executor.event()?;
        Ok(Piece { memory: executor.allocate_pinned(PIECE)?, free })
    }
}

impl Staging {
    pub fn new(executor: &Arc<dyn Executor>) -> Result<Self> {
        let mut staging = Staging {
            executor: executor.clone(),
            pieces: Vec::new(),
            current: 0,
            filled: 0,
            down: Piece::new(&**executor)?,
        };
        for _ in 0..PIECES {
            staging.pieces.push(Piece::new(&**executor)?);
        }
        Ok(staging)
    }

    /// Copies host bytes to the device behind what is in the queue; they may be changed when this returns.
    ///
    /// # Safety
    /// `to` begins so many bytes of the device's memory.
    pub unsafe fn upload(&mut self, queue: &Queue, to: *mut u8, bytes: &[u8]) -> Result<()> {
        queue.flush()?;
        let mut done = 0;
        for part in bytes.chunks(PIECE) {
            if part.len() > PIECE - self.filled {
                self.executor.record(self.pieces[self.current].free, Stream::Compute)?;
                self.current = (self.current + 1) % PIECES;
                self.filled = 0;
                self.executor.synchronize(self.pieces[self.current].free)?;
            }
            // SAFETY: the piece has room behind what is filled, and the device has copied what was there before. `to` is
            // as the caller promised.
            unsafe {
                let at = self.pieces[self.current].memory.as_ptr().add(self.filled);
                at.copy_from_nonoverlapping(part.as_ptr(), part.len());
                self.executor.copy(Stream::Compute, to.wrapping_add(done), at, part.len())?;
            }
            self.filled = (self.filled + part.len()).next_multiple_of(256).min(PIECE);
            done += part.len();
        }
        Ok(())
    }

    /// Copies bytes of the device to the host, after everything in the queue. What fits one piece together waits once.
    ///
    /// # Safety
    /// Each address begins so many bytes of the device's memory.
    pub unsafe fn download(&mut self, queue: &Queue, parts: &mut [(&mut [u8], *const u8)]) -> Result<()> {
        queue.flush()?;
        let mut here: Vec<(usize, usize, usize, usize)> = Vec::new(); // part, its byte, place in the piece, bytes
        let mut filled = 0;
        for part in 0..parts.len() {
            let (len, from) = (parts[part].0.len(), parts[part].1);
            let mut done = 0;
            while done < len {
                if filled == PIECE {
                    self.take(queue, &mut here, parts)?;
                    filled = 0;
                }
                let bytes = (len - done).min(PIECE - filled);
                let at = self.down.memory.as_ptr().wrapping_add(filled);
                // SAFETY: the piece has room; the caller promised the source.
                unsafe { self.executor.copy(Stream::Compute, at, from.wrapping_add(done), bytes)? };
                here.push((part, done, filled, bytes));
                done += bytes;
                filled += bytes;
            }
        }
        self.take(queue, &mut here, parts)
    }

    /// Waits for what was copied to the piece and takes it from there.
    fn take(
        &self,
        queue: &Queue,
        here: &mut Vec<(usize, usize, usize, usize)>,
        parts: &mut [(&mut [u8], *const u8)],
    ) -> Result<()> {
        queue.synchronize(self.down.free)?;
        for (part, at, from, bytes) in here.drain(..) {
            // SAFETY: the piece has these bytes, and the device has written them.
            let source = unsafe { std::slice::from_raw_parts(self.down.memory.as_ptr().add(from), bytes) };
            parts[part].0[at..at + bytes].copy_from_slice(source);
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let all = self.pieces.drain(..).map(|piece| piece.memory);
        all.chain([self.down.memory]).for_each(|memory| self.executor.free_pinned(memory));
    }
}
