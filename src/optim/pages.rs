//! Optimizer state in pages: in the backend's memory as far as the budget goes, the others in a memory-mapped file, or
//! in memory of the host from which a device streams them.

use crate::backend::{Backend, PAGES_AHEAD};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::fs::temporary_sibling;
use crate::tensor::Tensor;
use memmap2::MmapRaw;
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Elements of the parameters that a page stands for: 8 MiB of AdamW's moments.
const PAGE_ELEMENTS: usize = 1 << 20;

/// One part of the state: a number for each `block` elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct StateSpec {
    /// PyTorch's name.
    pub name: &'static str,
    pub dtype: DType,
    pub block: usize,
    /// The byte that stands for zero.
    pub zero: u8,
}

impl StateSpec {
    /// Bytes for so many elements.
    pub fn bytes(&self, elements: usize) -> usize {
        elements.div_ceil(self.block) * self.dtype.size()
    }

    /// The shape of this part for a parameter.
    pub fn shape(&self, parameter: &[usize]) -> Vec<usize> {
        if self.block == 1 {
            return parameter.to_vec();
        }
        vec![parameter.iter().product::<usize>().div_ceil(self.block)]
    }
}

/// The state of a range of elements.
#[derive(Debug)]
pub(super) struct Page {
    pub range: Range<usize>,
    /// One tensor for each part of the state.
    pub state: Vec<Tensor>,
    paged: bool,
}

impl Page {
    /// Whether the page is outside the memory that the backend computes in.
    pub fn is_paged(&self) -> bool {
        self.paged
    }

    /// One part of the state for a range of elements inside the page.
    pub fn slice(&self, part: usize, block: usize, range: &Range<usize>) -> Result<Tensor> {
        let (start, end) = (range.start - self.range.start, range.end - self.range.start);
        self.state[part].slice(start / block..end.div_ceil(block))
    }

    /// All parts of `here`, the page where it is used, for a range of elements inside the page.
    pub fn slices(&self, here: &[Tensor], specs: &[StateSpec], range: &Range<usize>) -> Result<Vec<Tensor>> {
        let (start, end) = (range.start - self.range.start, range.end - self.range.start);
        let slice =
            |(part, spec): (&Tensor, &StateSpec)| part.slice(start / spec.block..end.div_ceil(spec.block));
        here.iter().zip(specs).map(slice).collect()
    }
}

/// Pages of zeros for so many elements, of which at most `budget` bytes stay in memory.
pub(super) fn pages(
    backend: &Backend,
    specs: &[StateSpec],
    elements: usize,
    budget: Option<usize>,
    folder: &Path,
) -> Result<Vec<Page>> {
    let ranges: Vec<_> = (0..elements)
        .step_by(PAGE_ELEMENTS)
        .map(|start| start..elements.min(start + PAGE_ELEMENTS))
        .collect();
    let resident = resident_pages(specs, elements, budget).min(ranges.len());
    let (in_memory, paged) = ranges.split_at(resident);
    let mut pages = Vec::new();
    // Without pages elsewhere nothing waits for a page by itself.
    let together = if paged.is_empty() { whole_pages_together(in_memory) } else { in_memory.to_vec() };
    for range in together {
        let state = specs
            .iter()
            .map(|spec| backend.zeros(&[range.len().div_ceil(spec.block)], spec.dtype))
            .collect::<Result<_>>()?;
        pages.push(Page { range, state, paged: false });
    }
    if !paged.is_empty() {
        pages.extend(match host_pages(backend, specs, paged)? {
            Some(pages) => pages,
            None => file_pages(specs, paged, folder)?,
        });
    }
    for page in &mut pages {
        for (spec, tensor) in specs.iter().zip(&mut page.state).filter(|(spec, _)| spec.zero != 0) {
            backend.upload(tensor, &vec![spec.zero; tensor.bytes()])?;
        }
        if page.paged {
            page.state.iter().for_each(Tensor::release_pages);
        }
    }
    Ok(pages)
}

/// The ranges with whole pages joined, so that few launches change them. The arena rounds blocks of up to 16 pages to whole
/// ones, so nothing is lost; the last page, which may be smaller, stays by itself.
fn whole_pages_together(ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let whole = ranges.partition_point(|range| range.len() == PAGE_ELEMENTS);
    let joined = ranges[..whole].chunks(16).map(|some| some[0].start..some[some.len() - 1].end);
    joined.chain(ranges[whole..].iter().cloned()).collect()
}

/// Pages in the host's memory, if the backend streams them from there.
fn host_pages(backend: &Backend, specs: &[StateSpec], ranges: &[Range<usize>]) -> Result<Option<Vec<Page>>> {
    let mut pages = Vec::new();
    for range in ranges {
        let mut state = Vec::new();
        for spec in specs {
            let Some(part) = backend.page_memory(&[range.len().div_ceil(spec.block)], spec.dtype)? else {
                return Ok(None);
            };
            state.push(part);
        }
        pages.push(Page { range: range.clone(), state, paged: true });
    }
    Ok(Some(pages))
}

/// Pages in a file, one after the other.
fn file_pages(specs: &[StateSpec], ranges: &[Range<usize>], folder: &Path) -> Result<Vec<Page>> {
    let bytes = |range: &Range<usize>| specs.iter().map(|s| aligned(s.bytes(range.len()))).sum::<usize>();
    let map = page_file(folder, ranges.iter().map(bytes).sum())?;
    let mut offset = 0;
    let mut page = |range: &Range<usize>| {
        let mut state = Vec::new();
        for spec in specs {
            let shape = [range.len().div_ceil(spec.block)];
            state.push(Tensor::from_paged(map.clone(), offset, &shape, spec.dtype)?);
            offset += aligned(spec.bytes(range.len()));
        }
        Ok(Page { range: range.clone(), state, paged: true })
    };
    ranges.iter().map(&mut page).collect()
}

/// How many pages stay in memory: all that fit, or as many as leave room for those on their way.
fn resident_pages(specs: &[StateSpec], elements: usize, budget: Option<usize>) -> usize {
    let bytes = |elements| specs.iter().map(|spec| spec.bytes(elements)).sum::<usize>();
    match budget {
        Some(budget) if budget < bytes(elements) => {
            (budget / bytes(PAGE_ELEMENTS.min(elements)).max(1)).saturating_sub(PAGES_AHEAD)
        }
        _ => elements.div_ceil(PAGE_ELEMENTS),
    }
}

/// Bytes of state in the backend's memory, with the pages on their way, and outside.
pub(super) fn page_bytes(specs: &[StateSpec], elements: usize, budget: Option<usize>) -> (usize, usize) {
    let bytes = |elements| specs.iter().map(|spec| spec.bytes(elements)).sum::<usize>();
    let all = bytes(elements);
    let resident = bytes(elements.min(resident_pages(specs, elements, budget) * PAGE_ELEMENTS));
    let moving = bytes(PAGES_AHEAD * PAGE_ELEMENTS).min(all - resident);
    (resident + moving, all - resident)
}

/// The parts of a page start where pages of the system's memory do, so that they come and go alone.
fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(4096)
}

/// A file of zeros, written in full so that a full disk is an error now and not a signal later; its name is
/// removed at once, and its blocks when the map goes.
fn page_file(folder: &Path, bytes: usize) -> Result<Arc<MmapRaw>> {
    let path = temporary_sibling(&folder.join("optimizer_pages"))?;
    let fail = |e: std::io::Error| Error::io(&path, e);
    let mapped = (|| {
        let mut file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(fail)?;
        let zeros = vec![0; 1 << 20];
        let mut left = bytes;
        while left > 0 {
            let part = left.min(zeros.len());
            file.write_all(&zeros[..part]).map_err(fail)?;
            left -= part;
        }
        MmapRaw::map_raw(&file).map_err(fail)
    })();
    let _ = fs::remove_file(&path);
    Ok(Arc::new(mapped?))
}
