//! What this process may use: the CPUs of its engine's threads, and its memory.
//!
//! How many CPUs there are to share is the standard library's to say, which knows of affinity and of control
//! groups' quotas; memory limits it does not know, so they are read here.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use super::NodeError;
use crate::{config::Config, domain::ModelId, engine::MemoryNeed};

const MIB: u64 = 1 << 20;
const CALLER: Pid = Pid::from_raw(0);

/// Where threads that compute may run; everywhere where it is empty.
#[derive(Clone, Debug, Default)]
pub struct EngineCpus(BTreeSet<usize>);

impl EngineCpus {
    /// # Errors
    /// The set names a CPU that this process may not use.
    pub fn of(config: &Config) -> Result<Self, NodeError> {
        let wanted = config.engine.cpus();
        let allowed = sched_getaffinity(CALLER).map_err(|error| NodeError::Limits(format!("CPU affinity: {error}")))?;
        match wanted.iter().find(|cpu| !allowed.is_set(**cpu).unwrap_or(false)) {
            Some(cpu) => {
                Err(NodeError::Limits(format!("engine.cpu_set names CPU {cpu}, which this process may not use")))
            }
            None => Ok(Self(wanted)),
        }
    }

    /// Does the work on these CPUs; threads that it starts stay there, this one comes back.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> Result<T, NodeError> {
        if self.0.is_empty() {
            return Ok(work());
        }
        let fault = |error: nix::Error| NodeError::Limits(format!("engine.cpu_set: {error}"));
        let mut set = CpuSet::new();
        for cpu in &self.0 {
            set.set(*cpu).map_err(fault)?;
        }
        let _before = Affinity(sched_getaffinity(CALLER).map_err(fault)?);
        sched_setaffinity(CALLER, &set).map_err(fault)?;
        Ok(work())
    }
}

/// Comes back when it is dropped, also where the work panics.
struct Affinity(CpuSet);

impl Drop for Affinity {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(CALLER, &self.0) {
            tracing::warn!(%error, "a thread's CPU affinity was not restored");
        }
    }
}

/// Refuses models that do not fit `node.memory_max_mib`, or the control group's limit less a reserve.
pub fn check_memory(config: &Config, needs: &[(ModelId, MemoryNeed)]) -> Result<(), NodeError> {
    let budget = match config.node.memory_max_mib {
        0 => {
            let limit = memory_limit(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
            limit.map(|limit| Budget { bytes: limit - limit / 8, name: "7/8 of the control group's limit" })
        }
        mib => Some(Budget { bytes: (mib as u64).saturating_mul(MIB), name: "node.memory_max_mib" }),
    };
    match budget {
        Some(budget) => budget.check(needs),
        None => Ok(()),
    }
}

struct Budget {
    bytes: u64,
    name: &'static str,
}

impl Budget {
    fn check(&self, needs: &[(ModelId, MemoryNeed)]) -> Result<(), NodeError> {
        let total = needs.iter().fold(PROCESS_BYTES, |sum, (_, need)| sum.saturating_add(need.total()));
        tracing::info!(needed_mib = total.div_ceil(MIB), allowed_mib = self.bytes / MIB, by = self.name, "memory");
        if total <= self.bytes {
            return Ok(());
        }
        let mib = |bytes: u64| bytes.div_ceil(MIB);
        let models: Vec<_> = needs
            .iter()
            .map(|(id, need)| {
                let (weights, kv, work) = (mib(need.weights), mib(need.kv), mib(need.work));
                format!("{id}: weights {weights}, KV blocks {kv}, work {work}")
            })
            .collect();
        Err(NodeError::Limits(format!(
            "{} MiB of memory are needed and {} allowed ({}): {}; the process {}. Lower kv_memory_mib or \
             sequences_max, serve fewer models, or allow more",
            mib(total),
            self.bytes / MIB,
            self.name,
            models.join("; "),
            mib(PROCESS_BYTES),
        )))
    }
}

/// The program, its libraries, its threads' stacks, and what the HTTP side buffers; measured, and rounded up.
const PROCESS_BYTES: u64 = 96 * MIB;

/// The tightest memory limit of this process's control group and those above it. Version 2's unified tree, or
/// version 1's controller of its own; no limit where there is none, or where it cannot be read.
fn memory_limit(own: &Path, root: &Path) -> Option<u64> {
    let text = fs::read_to_string(own).ok()?;
    let limits = text.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        if controllers.is_empty() {
            limits_above(root, path, "memory.max")
        } else if controllers.split(',').any(|controller| controller == "memory") {
            limits_above(&root.join("memory"), path, "memory.limit_in_bytes")
        } else {
            Vec::new()
        }
    });
    // Without a limit version 1 says a number beyond any memory.
    limits.min().filter(|limit| *limit < 1 << 60)
}

fn limits_above(root: &Path, path: &str, file: &str) -> Vec<u64> {
    let mut folder: PathBuf = root.join(path.trim_start_matches('/'));
    let mut limits = Vec::new();
    while folder.starts_with(root) {
        let limit = fs::read_to_string(folder.join(file)).ok();
        limits.extend(limit.and_then(|text| text.trim().parse::<u64>().ok()));
        if !folder.pop() {
            break;
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(own: &str, files: &[(&str, &str)]) -> Option<u64> {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join("fs").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        fs::write(folder.path().join("own"), own).unwrap();
        memory_limit(&folder.path().join("own"), &folder.path().join("fs"))
    }

    #[test]
    fn the_tightest_limit_of_the_group_and_those_above_it_counts() {
        let files = [("memory.max", "max\n"), ("a/memory.max", "1000\n"), ("a/b/memory.max", "3000\n")];
        assert_eq!(group("0::/a/b\n", &files), Some(1000));
        assert_eq!(group("0::/\n", &files), None);
        // A container sees its own group as the root.
        assert_eq!(group("0::/\n", &[("memory.max", "4096\n")]), Some(4096));
        assert_eq!(group("0::/gone\n", &[("memory.max", "4096\n")]), Some(4096));
        assert_eq!(group("0::/../../elsewhere\n", &[]), None);
        assert_eq!(group("nonsense", &files), None);
    }

    #[test]
    fn version_1_is_read_as_well_and_its_no_limit_is_none() {
        let own = "5:cpu,cpuacct:/x\n4:memory:/x\n";
        assert_eq!(group(own, &[("memory/x/memory.limit_in_bytes", "5000\n")]), Some(5000));
        assert_eq!(group(own, &[("memory/x/memory.limit_in_bytes", "9223372036854771712\n")]), None);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_parts() {
        let need = MemoryNeed { weights: 100 * MIB, kv: 512 * MIB, work: MIB + 1 };
        let needs = [(ModelId::from("a"), need), (ModelId::from("b"), need)];
        let budget = |mib| Budget { bytes: mib * MIB, name: "node.memory_max_mib" };
        budget(1400).check(&needs).unwrap();
        let error = budget(1300).check(&needs).unwrap_err().to_string();
        let said = "1323 MiB of memory are needed and 1300 allowed (node.memory_max_mib): \
                    a: weights 100, KV blocks 512, work 2; b: weights 100, KV blocks 512, work 2; the process 96.";
        assert!(error.starts_with(said), "{error}");
    }

    #[test]
    fn threads_that_the_engine_starts_stay_on_its_cpus_and_the_caller_comes_back() {
        let before = sched_getaffinity(CALLER).unwrap();
        let cpu = (0..CpuSet::count()).find(|cpu| before.is_set(*cpu).unwrap()).unwrap();
        let own = |set: CpuSet| (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap()).collect::<Vec<_>>();
        let started = EngineCpus(BTreeSet::from([cpu])).within(|| std::thread::spawn(|| sched_getaffinity(CALLER)));
        assert_eq!(own(started.unwrap().join().unwrap().unwrap()), [cpu]);
        assert_eq!(sched_getaffinity(CALLER).unwrap(), before);
    }
}
