//! Graphs of kernels and copies, and their nodes in the driver's terms.

use super::super::executor::{Graph, Node, Stream};
use super::{Device, cluster_attribute};
use crate::error::Result;
use cudarc::driver::sys;

/// A graph that can be started, and its nodes in order.
pub(super) struct Recorded {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
}

impl Recorded {
    /// Gives the handles back; the driver keeps what still runs.
    pub(super) fn destroy(&self) {
        // SAFETY: the handles are this value's, and it is not used any more.
        unsafe {
            if !self.exec.is_null() {
                let _ = sys::cuGraphExecDestroy(self.exec);
            }
            let _ = sys::cuGraphDestroy(self.graph);
        }
    }
}

impl Device {
    /// [`Executor::graph`](super::super::executor::Executor::graph).
    pub(super) fn make_graph(&self, nodes: &[Node<'_>]) -> Result<Graph> {
        self.enter()?;
        let fail = |e| self.error("no graph could be made", e);
        let mut recorded =
            Recorded { graph: std::ptr::null_mut(), exec: std::ptr::null_mut(), nodes: Vec::new() };
        // SAFETY: the driver writes one handle.
        unsafe { sys::cuGraphCreate(&mut recorded.graph, 0) }.result().map_err(fail)?;
        let made = nodes.iter().try_for_each(|node| self.add_node(&mut recorded, node)).and_then(|()| {
            // SAFETY: the graph is whole; the driver writes one handle.
            unsafe { sys::cuGraphInstantiateWithFlags(&mut recorded.exec, recorded.graph, 0) }
                .result()
                .map_err(fail)
        });
        if let Err(e) = made {
            recorded.destroy();
            return Err(e);
        }
        let mut graphs = self.graphs.lock().expect("the lock is never held across a panic");
        let number = graphs.keys().max().map_or(0, |last| last + 1);
        graphs.insert(number, recorded);
        Ok(Graph(number))
    }

    /// [`Executor::update_graph`](super::super::executor::Executor::update_graph).
    pub(super) fn change_graph(&self, graph: Graph, index: usize, node: &Node<'_>) -> Result<()> {
        self.enter()?;
        let graphs = self.graphs.lock().expect("the lock is never held across a panic");
        let (exec, handle) = (graphs[&graph.0].exec, graphs[&graph.0].nodes[index]);
        self.with_params(
            node,
            // SAFETY: the node is one of the graph's, of this kind; the driver copies what it is given.
            |kernel| unsafe { sys::cuGraphExecKernelNodeSetParams_v2(exec, handle, kernel) },
            // SAFETY: as above.
            |copy| unsafe { sys::cuGraphExecMemcpyNodeSetParams(exec, handle, copy, self.context) },
        )
    }

    /// [`Executor::launch_graph`](super::super::executor::Executor::launch_graph).
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn start_graph(&self, graph: Graph) -> Result<()> {
        self.enter()?;
        let graphs = self.graphs.lock().expect("the lock is never held across a panic");
        // SAFETY: graph and stream are this device's; the caller promised for the nodes.
        unsafe { sys::cuGraphLaunch(graphs[&graph.0].exec, self.streams[Stream::Compute as usize]) }
            .result()
            .map_err(|e| self.error("a graph of kernels did not start", e))
    }

    /// [`Executor::drop_graph`](super::super::executor::Executor::drop_graph).
    pub(super) fn free_graph(&self, graph: Graph) {
        let mut graphs = self.graphs.lock().expect("the lock is never held across a panic");
        if let Some(recorded) = graphs.remove(&graph.0).filter(|_| self.enter().is_ok()) {
            recorded.destroy();
        }
    }

    /// Puts a node behind the last one.
    fn add_node(&self, recorded: &mut Recorded, node: &Node<'_>) -> Result<()> {
        let mut handle = std::ptr::null_mut();
        let last = recorded.nodes.last().map_or(std::ptr::null(), std::ptr::from_ref);
        let (graph, count, to) = (recorded.graph, usize::from(!last.is_null()), &raw mut handle);
        self.with_params(
            node,
            // SAFETY: the driver reads `count` nodes of the same graph, copies what it is given and writes one handle.
            |kernel| unsafe { sys::cuGraphAddKernelNode_v2(to, graph, last, count, kernel) },
            // SAFETY: as above.
            |copy| unsafe { sys::cuGraphAddMemcpyNode(to, graph, last, count, copy, self.context) },
        )?;
        recorded.nodes.push(handle);
        if let Node::Launch(launch) = node
            && launch.cluster > 1
        {
            let attribute = cluster_attribute(launch.cluster);
            // SAFETY: the node is the graph's, and of a kernel.
            unsafe { sys::cuGraphKernelNodeSetAttribute(handle, attribute.id, &attribute.value) }
                .result()
                .map_err(|e| self.error("a graph's node could not be set", e))?;
        }
        Ok(())
    }

    /// Calls the driver with a node's parameters in its terms.
    fn with_params(
        &self,
        node: &Node<'_>,
        kernel: impl FnOnce(&sys::CUDA_KERNEL_NODE_PARAMS) -> sys::CUresult,
        copy: impl FnOnce(&sys::CUDA_MEMCPY3D) -> sys::CUresult,
    ) -> Result<()> {
        let result = match *node {
            Node::Launch(launch) => {
                let function = self.function(launch.kernel, launch.shared_bytes)?;
                let mut params = [launch.params.as_ptr().cast_mut().cast()];
                // SAFETY: a structure of the C header, for which zeros mean nothing special.
                let mut of_kernel: sys::CUDA_KERNEL_NODE_PARAMS = unsafe { std::mem::zeroed() };
                of_kernel.func = function;
                [of_kernel.gridDimX, of_kernel.gridDimY, of_kernel.gridDimZ] = launch.grid;
                [of_kernel.blockDimX, of_kernel.blockDimY, of_kernel.blockDimZ] = [launch.threads, 1, 1];
                of_kernel.sharedMemBytes = launch.shared_bytes;
                of_kernel.kernelParams = params.as_mut_ptr();
                kernel(&of_kernel)
            }
            Node::Copy { to, from, bytes } => {
                // The kinds of memory have no zero; for all else zeros serve.
                let mut of_copy = std::mem::MaybeUninit::<sys::CUDA_MEMCPY3D>::zeroed();
                let at = of_copy.as_mut_ptr();
                // SAFETY: the fields are inside the structure, and the kinds are set before it is seen as one.
                let of_copy = unsafe {
                    (&raw mut (*at).srcMemoryType).write(sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
                    (&raw mut (*at).dstMemoryType).write(sys::CUmemorytype::CU_MEMORYTYPE_DEVICE);
                    (*at).srcDevice = from as sys::CUdeviceptr;
                    (*at).dstDevice = to as sys::CUdeviceptr;
                    ((*at).WidthInBytes, (*at).Height, (*at).Depth) = (bytes, 1, 1);
                    of_copy.assume_init()
                };
                copy(&of_copy)
            }
        };
        result.result().map_err(|e| self.error("a graph's node could not be set", e))
    }
}
