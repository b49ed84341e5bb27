//! A team of threads for many short parallel regions: decoding a token has hundreds of a few microseconds each, less
//! than a sleeping thread takes to wake.
//!
//! A region's jobs are split into a range for each thread; who is through with its own takes from the ends of others'.
//! Threads look for the next region for a while before they sleep, and a region waits only for those that came.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, TryLockError};
use std::thread::{JoinHandle, yield_now};

/// Looks for a region before a thread gives way to others, and times it gives way before it sleeps.
const SPINS: usize = 2000;
const YIELDS: usize = 20;

/// Set in [`Shared::gate`] while threads may come; below it is the number that came, above it the region's number.
const OPEN: u64 = 1 << 31;

type Job = *const (dyn Fn(usize) + Sync);

#[repr(align(64))]
struct Padded(AtomicU64);

struct Shared {
    gate: Padded,
    left: AtomicUsize, // threads that came to this region and are through
    sleepers: AtomicUsize,
    stop: AtomicBool,
    panicked: AtomicBool,
    ranges: Vec<Padded>, // by thread: jobs [start << 32 | end)
    job: UnsafeCell<Option<Job>>,
    mutex: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written by the region's owner while the gate is closed and nobody is inside, and read by threads that
// came through the gate, whose operations order the accesses.
unsafe impl Sync for Shared {}
// SAFETY: the job's pointer is used only while its owner waits in `Team::run`.
unsafe impl Send for Shared {}

/// The threads; the one that calls [`Team::run`] is one of them.
pub(super) struct Team {
    shared: Arc<Shared>,
    region: Mutex<()>, // one at a time
    handles: Vec<JoinHandle<()>>,
}

impl Team {
    /// A team of `threads`, the caller's included.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            gate: Padded(AtomicU64::new(0)),
            left: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            ranges: (0..threads).map(|_| Padded(AtomicU64::new(0))).collect(),
            job: UnsafeCell::new(None),
            mutex: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut team = Team { shared, region: Mutex::new(()), handles: Vec::new() };
        for me in 1..threads {
            let shared = team.shared.clone();
            let builder = std::thread::Builder::new().name(format!("lowrank-{me}"));
            team.handles.push(builder.spawn(move || shared.serve(me))?);
        }
        Ok(team)
    }

    /// Runs `job` for `0..jobs` on all threads; on the calling one if another region is running.
    pub fn run(&self, jobs: usize, job: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        let _region = match self.region.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(), // by a job's panic, which left nobody inside
            Err(TryLockError::WouldBlock) => return (0..jobs).for_each(job),
        };
        let threads = shared.ranges.len();
        assert!(jobs < 1 << 31, "a region has fewer than 2^31 jobs");
        for (i, range) in shared.ranges.iter().enumerate() {
            let (start, end) = (i * jobs / threads, (i + 1) * jobs / threads);
            range.0.store((start as u64) << 32 | end as u64, Ordering::Relaxed);
        }
        shared.left.store(0, Ordering::Relaxed);
        // SAFETY: the gate is closed and nobody is inside. The lifetime is dropped, but this function does not return
        // before all threads that came are through.
        unsafe { *shared.job.get() = Some(std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(job)) };
        let number = (shared.gate.0.load(Ordering::Relaxed) >> 32) + 1;
        shared.gate.0.store(number << 32 | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.mutex.lock();
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| shared.work(0, job)));
        let came = (shared.gate.0.fetch_and(!OPEN, Ordering::AcqRel) & (OPEN - 1)) as usize;
        let mut spins = 0;
        while shared.left.load(Ordering::Acquire) != came {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { yield_now() }
        }
        let elsewhere = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!elsewhere, "a job panicked on another thread");
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Ok(_guard) = self.shared.mutex.lock() {
            self.shared.wake.notify_all();
        }
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

impl Shared {
    /// A thread's life.
    fn serve(&self, me: usize) {
        let mut seen = 0;
        while let Some(region) = self.next_region(seen) {
            seen = region;
            let gate = self.gate.0.load(Ordering::Acquire);
            let is_open = gate & OPEN != 0 && gate >> 32 == region;
            let enter = || self.gate.0.compare_exchange(gate, gate + 1, Ordering::AcqRel, Ordering::Relaxed);
            if !is_open {
                continue;
            }
            if enter().is_err() {
                seen = region - 1; // another thread came at the same time
                continue;
            }
            // SAFETY: this thread came through the gate, so the owner waits and the job is there.
            if let Some(job) = unsafe { (*self.job.get()).map(|job| &*job) }
                && catch_unwind(AssertUnwindSafe(|| self.work(me, job))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.left.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits for an open region other than the last one; `None` when the team ends.
    fn next_region(&self, seen: u64) -> Option<u64> {
        let look = || {
            let gate = self.gate.0.load(Ordering::SeqCst);
            (gate & OPEN != 0 && gate >> 32 != seen).then_some(gate >> 32)
        };
        loop {
            for round in 0..SPINS + YIELDS {
                if let Some(region) = look() {
                    return Some(region);
                }
                if round < SPINS { std::hint::spin_loop() } else { yield_now() }
            }
            let Ok(mut guard) = self.mutex.lock() else { return None };
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            while look().is_none() && !self.stop.load(Ordering::SeqCst) {
                match self.wake.wait(guard) {
                    Ok(again) => guard = again,
                    Err(_) => return None,
                }
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
        }
    }

    /// Runs jobs: the thread's own from the front, then others' from the back.
    fn work(&self, me: usize, job: &(dyn Fn(usize) + Sync)) {
        let threads = self.ranges.len();
        for victim in (me..threads).chain(0..me) {
            while let Some(i) = self.take(victim, victim == me) {
                job(i);
            }
        }
    }

    fn take(&self, victim: usize, front: bool) -> Option<usize> {
        let range = &self.ranges[victim].0;
        let mut now = range.load(Ordering::Relaxed);
        loop {
            let (start, end) = (now >> 32, now & 0xffff_ffff);
            if start >= end {
                return None;
            }
            let (index, then) =
                if front { (start, (start + 1) << 32 | end) } else { (end - 1, start << 32 | (end - 1)) };
            match range.compare_exchange_weak(now, then, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Some(index as usize),
                Err(other) => now = other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once_whatever_the_sizes() {
        for threads in [1, 2, 3, 8] {
            let team = Team::new(threads).unwrap();
            for jobs in [0usize, 1, 2, 7, 100, 1001] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..jobs).map(|_| AtomicUsize::new(0)).collect();
                    team.run(jobs, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(
                        counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                        "{threads} threads, {jobs} jobs"
                    );
                }
            }
        }
    }

    #[test]
    fn regions_inside_regions_and_after_sleep() {
        let team = Team::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        for _ in 0..5 {
            team.run(4, &|_| {
                team.run(3, &|i| {
                    sum.fetch_add(i, Ordering::Relaxed);
                });
            });
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(sum.into_inner(), 5 * 4 * 3);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        let team = Team::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| team.run(100, &|i| assert!(i % 10 != 7, "job {i}"))));
        assert!(result.is_err());
        let done = AtomicUsize::new(0);
        team.run(10, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 10);
    }
}
