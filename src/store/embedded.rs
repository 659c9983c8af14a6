//! The store of a single machine: a Valkey (or Redis) server that the node starts, supervises and stops.
//!
//! Promises that the server speaks on a Unix socket that nobody else may open, that what it acknowledged is
//! in its append-only file, that it is restarted with backoff when it dies, and that it does not outlive the
//! process, not even one that was killed. Never listens on a network, and never evicts.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
        net::UnixStream,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use parking_lot::{Condvar, Mutex};
use sha2::{Digest, Sha256};

use crate::child;

/// The longest socket path that every system takes.
const SOCKET_PATH_BYTES_MAX: usize = 100;
/// A server that has not begun to answer by then will not.
const START_MAX: Duration = Duration::from_secs(15);
/// One that loads a large append-only file says so, and may take this long.
const LOADING_MAX: Duration = Duration::from_secs(600);
/// A server that was asked to stop and did not is killed.
const STOP_MAX: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// A server that ran for this long starts a new count of failures.
const STEADY: Duration = Duration::from_secs(30);
const WATCH: Duration = Duration::from_millis(50);
const LOG_BYTES_MAX: u64 = 1 << 20;
/// Where the address of a running server is written, under the data folder.
const ADDRESS_FILE: &str = "run/store.url";

#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error("no valkey-server or redis-server program: looked for {0}; set store.server_program or store.redis_url")]
    NoProgram(String),
    #[error("cannot run the store's server {program}: {source}")]
    Spawn { program: PathBuf, source: io::Error },
    #[error("cannot use {path} for the embedded store: {source}")]
    Folder { path: PathBuf, source: io::Error },
    #[error("{0} is not ours alone; remove it")]
    UnsafeFolder(PathBuf),
    #[error("another server still runs on this data folder's store (socket {0})")]
    InUse(PathBuf),
    #[error("the store's server did not start: {0}")]
    NotStarted(String),
}

/// When the append-only file is forced to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    Always,
    Everysec,
}

/// A running server. Dropping it stops the server.
pub struct EmbeddedServer {
    url: String,
    address_file: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: Mutex<bool>,
    wake: Condvar,
    pid: AtomicU32,
    restarts: AtomicU32,
}

struct Plan {
    program: PathBuf,
    socket: PathBuf,
    folder: PathBuf,
    log: PathBuf,
    fsync: Fsync,
}

impl EmbeddedServer {
    /// Starts the server and waits until it answers. Blocks; call it where that is allowed. The caller holds
    /// the lock of the data folder. An empty `program` looks in `data_dir/bin`, then on the PATH.
    pub fn start(data_dir: &Path, program: &str, fsync: Fsync) -> Result<Self, EmbeddedError> {
        let folder = data_dir.join("store");
        private_folder(&folder)?;
        private_folder(&data_dir.join("run"))?;
        let data_dir = data_dir.canonicalize().map_err(in_folder(data_dir))?;
        let program = find_program(&data_dir, program)?;
        let socket = socket_path(&data_dir)?;
        let plan =
            Plan { program, socket, folder: data_dir.join("store"), log: data_dir.join("store/server.log"), fsync };
        plan.clear()?;
        let shared = Arc::new(Shared::default());
        let (started, wait) = mpsc::sync_channel(1);
        let url = format!("unix://{}", plan.socket.display());
        // The kernel kills the server when the thread that spawned it ends, so that thread is this one, which
        // lives for as long as the server should.
        let thread = thread::Builder::new()
            .name("store-server".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || supervise(&plan, &shared, &started)
            })
            .map_err(in_folder(&data_dir))?;
        let server = Self { url, address_file: data_dir.join(ADDRESS_FILE), shared, thread: Some(thread) };
        wait.recv().unwrap_or_else(|_| Err(EmbeddedError::NotStarted("its supervisor ended".into())))?;
        fs::write(&server.address_file, &server.url).map_err(in_folder(&server.address_file))?;
        Ok(server)
    }

    /// For `Store::connect`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Process id of the server that runs now; 0 between two.
    pub fn pid(&self) -> u32 {
        self.shared.pid.load(Ordering::Acquire)
    }

    /// How often the server died and was started again.
    pub fn restarts(&self) -> u32 {
        self.shared.restarts.load(Ordering::Acquire)
    }

    /// Asks the server to write everything and end, and waits for that. Blocks.
    pub fn stop(mut self) {
        self.end();
    }

    /// The address of the server that another process runs on `data_dir`, if it answers.
    pub fn running(data_dir: &Path) -> Option<String> {
        let url = fs::read_to_string(data_dir.join(ADDRESS_FILE)).ok()?;
        let socket = url.trim().strip_prefix("unix://")?;
        matches!(ping(Path::new(socket)), Ok(Health::Ready)).then(|| url.trim().to_owned())
    }

    fn end(&mut self) {
        *self.shared.stop.lock() = true;
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.address_file);
    }
}

impl Drop for EmbeddedServer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    /// Waits; `true` when it is time to stop.
    fn pause(&self, time: Duration) -> bool {
        let mut stop = self.stop.lock();
        if !*stop {
            let _ = self.wake.wait_for(&mut stop, time);
        }
        *stop
    }
}

/// Runs until told to stop, or until the first start fails.
fn supervise(plan: &Plan, shared: &Shared, started: &mpsc::SyncSender<Result<(), EmbeddedError>>) {
    let mut first = true;
    let mut failures = 0_u32;
    loop {
        let begun = Instant::now();
        let outcome = plan.spawn().and_then(|child| {
            shared.pid.store(child.id(), Ordering::Release);
            plan.watch(child, shared, || {
                if first {
                    first = false;
                    let _ = started.send(Ok(()));
                }
            })
        });
        shared.pid.store(0, Ordering::Release);
        let why = match outcome {
            Ok(Ended::Stopped) => return,
            Ok(Ended::Died(why)) => why,
            Err(error) if first => {
                let _ = started.send(Err(error));
                return;
            }
            Err(error) => error.to_string(),
        };
        failures = if begun.elapsed() > STEADY { 1 } else { failures + 1 };
        let delay = BACKOFF_MAX.min(BACKOFF_MIN * 2_u32.saturating_pow(failures.min(16) - 1));
        tracing::error!(why, ?delay, "the embedded store's server ended; starting it again");
        shared.restarts.fetch_add(1, Ordering::AcqRel);
        if shared.pause(delay) {
            return;
        }
    }
}

enum Ended {
    Stopped,
    Died(String),
}

impl Plan {
    /// Makes room for a new server: nobody may answer on the socket, and the log starts small.
    fn clear(&self) -> Result<(), EmbeddedError> {
        let begun = Instant::now();
        // The server of a node that was just killed may need a moment to end as well.
        while ping(&self.socket).is_ok() {
            if begun.elapsed() > Duration::from_secs(3) {
                return Err(EmbeddedError::InUse(self.socket.clone()));
            }
            thread::sleep(WATCH);
        }
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(in_folder(&self.socket)(error)),
            _ => {}
        }
        if fs::metadata(&self.log).is_ok_and(|meta| meta.len() > LOG_BYTES_MAX) {
            let _ = fs::rename(&self.log, self.log.with_extension("log.1"));
        }
        Ok(())
    }

    fn spawn(&self) -> Result<Child, EmbeddedError> {
        let fsync = match self.fsync {
            Fsync::Always => "always",
            Fsync::Everysec => "everysec",
        };
        let mut command = Command::new(&self.program);
        command.args(["--port", "0", "--unixsocketperm", "700", "--daemonize", "no", "--databases", "1"]);
        command.args(["--appendonly", "yes", "--appendfsync", fsync, "--save", ""]);
        command.args(["--maxmemory-policy", "noeviction", "--loglevel", "notice"]);
        command.arg("--unixsocket").arg(&self.socket).arg("--dir").arg(&self.folder).arg("--logfile").arg(&self.log);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Ctrl-C in a terminal reaches its whole foreground group; the server must outlive the drain.
        command.process_group(0);
        child::die_with_us(&mut command);
        command.spawn().map_err(|source| EmbeddedError::Spawn { program: self.program.clone(), source })
    }

    /// Waits for the server's first answer, then for its end.
    fn watch(&self, mut child: Child, shared: &Shared, ready: impl FnOnce()) -> Result<Ended, EmbeddedError> {
        let begun = Instant::now();
        let mut ready = Some(ready);
        loop {
            if shared.pause(WATCH) {
                stop(&mut child);
                return Ok(Ended::Stopped);
            }
            if let Ok(Some(status)) = child.try_wait() {
                let why = format!("{status}{}", self.last_words());
                return if ready.is_some() { Err(EmbeddedError::NotStarted(why)) } else { Ok(Ended::Died(why)) };
            }
            if ready.is_none() {
                continue;
            }
            let limit = match ping(&self.socket) {
                Ok(Health::Ready) => {
                    if let Some(ready) = ready.take() {
                        ready();
                    }
                    continue;
                }
                Ok(Health::Loading) => LOADING_MAX,
                Err(_) => START_MAX,
            };
            if begun.elapsed() > limit {
                stop(&mut child);
                return Err(EmbeddedError::NotStarted(format!("no answer in {limit:?}{}", self.last_words())));
            }
        }
    }

    /// The last line of the server's log says why it ended.
    fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().rev().find(|line| !line.trim().is_empty());
        line.map(|line| format!("; its last words: {}", line.trim())).unwrap_or_default()
    }
}

fn stop(child: &mut Child) {
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
    let begun = Instant::now();
    while begun.elapsed() < STOP_MAX {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
}

enum Health {
    Ready,
    Loading,
}

/// Whether somebody answers on the socket.
fn ping(socket: &Path) -> io::Result<Health> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"PING\r\n")?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)?;
    Ok(if answer == *b"+PONG" { Health::Ready } else { Health::Loading })
}

fn find_program(data_dir: &Path, configured: &str) -> Result<PathBuf, EmbeddedError> {
    if !configured.is_empty() {
        let program = PathBuf::from(configured);
        return if program.is_file() { Ok(program) } else { Err(EmbeddedError::NoProgram(configured.to_owned())) };
    }
    let own = data_dir.join("bin/valkey-server");
    let folders: Vec<_> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
    let on_path =
        ["valkey-server", "redis-server"].into_iter().flat_map(|name| folders.iter().map(move |f| f.join(name)));
    std::iter::once(own.clone())
        .chain(on_path)
        .find(|program| program.is_file())
        .ok_or_else(|| EmbeddedError::NoProgram(format!("{}, then on the PATH", own.display())))
}

/// In the data folder, or in a short one of ours where that path would be too long for a socket.
fn socket_path(data_dir: &Path) -> Result<PathBuf, EmbeddedError> {
    let socket = data_dir.join("run/store.sock");
    if socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
        return Ok(socket);
    }
    let digest = hex::encode(Sha256::digest(data_dir.as_os_str().as_encoded_bytes()));
    let folder = std::env::temp_dir().join(format!("lightcone-{}-{}", own_user(), &digest[..16]));
    private_folder(&folder)?;
    Ok(folder.join("store.sock"))
}

/// Makes `path` if need be; it must belong to us, and then only we may open it.
fn private_folder(path: &Path) -> Result<(), EmbeddedError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(in_folder(path))?;
    let meta = fs::symlink_metadata(path).map_err(in_folder(path))?;
    if !meta.is_dir() || meta.uid() != own_user() {
        return Err(EmbeddedError::UnsafeFolder(path.to_owned()));
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(in_folder(path))?;
    // Says now, and clearly, what the server would say later and in a log.
    let probe = path.join(".writable");
    File::create(&probe).and_then(|_| fs::remove_file(&probe)).map_err(in_folder(path))
}

fn own_user() -> u32 {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() }
}

fn in_folder(path: &Path) -> impl FnOnce(io::Error) -> EmbeddedError + '_ {
    |source| EmbeddedError::Folder { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program() -> String {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let own = manifest.join(".lightcone/bin/valkey-server");
        match std::env::var("LIGHTCONE_TEST_REDIS_SERVER") {
            Ok(program) => program,
            Err(_) if own.is_file() => own.display().to_string(),
            Err(_) => String::new(), // on the PATH, or a clear error
        }
    }

    fn start(data_dir: &Path) -> EmbeddedServer {
        EmbeddedServer::start(data_dir, &program(), Fsync::Everysec).expect("a valkey-server or redis-server")
    }

    fn ask(server: &EmbeddedServer, command: &str) -> Option<String> {
        let mut stream = UnixStream::connect(server.url().strip_prefix("unix://")?).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        stream.write_all(format!("{command}\r\n").as_bytes()).ok()?;
        let mut answer = [0; 64];
        let length = stream.read(&mut answer).ok()?;
        Some(String::from_utf8_lossy(&answer[..length]).into_owned())
    }

    fn eventually<T>(look: impl Fn() -> Option<T>) -> T {
        for _ in 0..400 {
            if let Some(found) = look() {
                return found;
            }
            thread::sleep(Duration::from_millis(25));
        }
        panic!("did not happen within ten seconds");
    }

    #[test]
    fn a_killed_server_is_started_again_with_its_data() {
        let folder = tempfile::tempdir().unwrap();
        let server = start(folder.path());
        assert_eq!(EmbeddedServer::running(folder.path()).as_deref(), Some(server.url()));
        assert_eq!(ask(&server, "SET word kept").unwrap(), "+OK\r\n");
        let pid = server.pid();
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
        let answer = eventually(|| {
            let restarted = server.pid() != pid && server.pid() != 0;
            restarted.then(|| ask(&server, "GET word")).flatten().filter(|answer| answer.contains("kept"))
        });
        assert_eq!(answer, "$4\r\nkept\r\n");
        assert_eq!(server.restarts(), 1);
    }

    #[test]
    fn a_stopped_server_leaves_nothing_behind_but_its_data() {
        let folder = tempfile::tempdir().unwrap();
        let server = start(folder.path());
        let pid = Pid::from_raw(server.pid().cast_signed());
        ask(&server, "SET word kept").unwrap();
        server.stop();
        assert!(kill(pid, None).is_err(), "the process has ended");
        assert_eq!(EmbeddedServer::running(folder.path()), None);
        let server = start(folder.path());
        assert_eq!(ask(&server, "GET word").unwrap(), "$4\r\nkept\r\n");
    }

    #[test]
    fn a_second_server_on_the_same_folder_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let _server = start(folder.path());
        let second = EmbeddedServer::start(folder.path(), &program(), Fsync::Everysec);
        assert!(matches!(second, Err(EmbeddedError::InUse(_))));
    }

    #[test]
    fn a_path_too_long_for_a_socket_gets_a_short_one() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(120));
        let server = start(&deep);
        assert!(server.url().len() < 120);
        assert_eq!(ask(&server, "PING").unwrap(), "+PONG\r\n");
        let short = PathBuf::from(server.url().strip_prefix("unix://").unwrap());
        drop(server);
        fs::remove_dir_all(short.parent().unwrap()).unwrap();
    }

    #[test]
    fn a_program_that_is_no_server_is_a_clear_error() {
        let folder = tempfile::tempdir().unwrap();
        let error = EmbeddedServer::start(folder.path(), "/bin/false", Fsync::Everysec).err().unwrap();
        assert!(matches!(&error, EmbeddedError::NotStarted(why) if why.contains("exit status: 1")), "{error}");
        let error = EmbeddedServer::start(folder.path(), "/nonexistent", Fsync::Everysec).err().unwrap();
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }
}
