//! An executor that does nothing: for the launches that a device would get, without one.

use super::executor::{Event, Executor, Graph, Launch, Node, Properties, Stream, TmaMatrix};
use crate::arena::MemorySource;
use crate::error::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Acts a device whose kernels do nothing. Its memory has addresses and no bytes; what is copied from there is zeros.
#[derive(Debug)]
pub struct DryExecutor {
    properties: Properties,
    gpcs: Vec<u32>,    // their multiprocessors; a cluster is in one
    next: AtomicUsize, // address that nothing has yet
    events: AtomicUsize,
    pinned: Mutex<HashMap<usize, Layout>>,
}

impl DryExecutor {
    /// Acts a device with these properties and one GPC.
    pub fn new(properties: Properties) -> Self {
        DryExecutor {
            gpcs: vec![properties.multiprocessors],
            properties,
            next: AtomicUsize::new(1 << 20),
            events: AtomicUsize::new(0),
            pinned: Mutex::default(),
        }
    }

    /// Acts an H200 whose GPCs are as equal as they can be, so that most clusters fit.
    pub fn h200() -> Self {
        let properties = Properties {
            name: "NVIDIA H200, acted by nothing".into(),
            capability: 90,
            multiprocessors: 132,
            memory: 141_000_000_000,
            shared_memory: 227 << 10,
        };
        let mut h200 = Self::new(properties);
        h200.gpcs = vec![18, 18, 16, 16, 16, 16, 16, 16];
        h200
    }
}

impl Drop for DryExecutor {
    fn drop(&mut self) {
        for (address, layout) in self.pinned.get_mut().unwrap_or_else(|e| e.into_inner()).drain() {
            // SAFETY: the block came from `allocate_pinned` with this layout, and its users are gone.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }
}

impl MemorySource for DryExecutor {
    fn allocate(&self, bytes: usize) -> Result<NonNull<u8>> {
        let address = self.next.fetch_add(bytes.next_multiple_of(256), Ordering::Relaxed);
        Ok(NonNull::new(std::ptr::without_provenance_mut(address)).unwrap_or(NonNull::dangling()))
    }

    fn free(&self, _pointer: NonNull<u8>) {}
}

impl Executor for DryExecutor {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn free_memory(&self) -> Result<usize> {
        Ok(self.properties.memory)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>> {
        let fail =
            || Error::OutOfMemory { bytes, what: "a copy".into(), advice: "the host has no more".into() };
        let layout = Layout::from_size_align(bytes.max(1), 256).map_err(|_| fail())?;
        // SAFETY: the layout is not empty.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(fail)?;
        self.pinned.lock().unwrap_or_else(|e| e.into_inner()).insert(pointer.as_ptr() as usize, layout);
        Ok(pointer)
    }

    fn free_pinned(&self, pointer: NonNull<u8>) {
        let mut pinned = self.pinned.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(layout) = pinned.remove(&(pointer.as_ptr() as usize)) {
            // SAFETY: the block came from `allocate_pinned` with this layout.
            unsafe { dealloc(pointer.as_ptr(), layout) };
        }
    }

    unsafe fn copy(&self, _stream: Stream, _to: *mut u8, _from: *const u8, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn tensor_map(&self, _matrix: &TmaMatrix) -> Result<[u64; 16]> {
        Ok([0; 16])
    }

    fn clusters_at_once(&self, launch: &Launch<'_>) -> Result<usize> {
        Ok(self.gpcs.iter().map(|multiprocessors| (multiprocessors / launch.cluster) as usize).sum())
    }

    unsafe fn launch(&self, _stream: Stream, _launch: &Launch<'_>) -> Result<()> {
        Ok(())
    }

    fn event(&self) -> Result<Event> {
        Ok(Event(self.events.fetch_add(1, Ordering::Relaxed)))
    }

    fn record(&self, _event: Event, _stream: Stream) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _stream: Stream, _event: Event) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self, _event: Event) -> Result<()> {
        Ok(())
    }

    fn synchronize_within(&self, _event: Event, _limit: Duration) -> Result<bool> {
        Ok(true)
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn graph(&self, _nodes: &[Node<'_>]) -> Result<Graph> {
        Ok(Graph(0))
    }

    fn update_graph(&self, _graph: Graph, _index: usize, _node: &Node<'_>) -> Result<()> {
        Ok(())
    }

    unsafe fn launch_graph(&self, _graph: Graph) -> Result<()> {
        Ok(())
    }

    fn drop_graph(&self, _graph: Graph) {}
}
