//! A private Valkey (or Redis) server for one test, on a Unix socket in a folder of its own.

use std::{
    io::{Read, Write},
    os::unix::{net::UnixStream, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use lightcone::store::Store;

const START_MAX: Duration = Duration::from_secs(20);
const COMMAND_MAX: Duration = Duration::from_secs(5);

/// Killed when dropped, and by the kernel should the test's thread die first.
pub struct Valkey {
    folder: tempfile::TempDir,
    child: Option<Child>,
}

impl Valkey {
    /// Must be called on the test's own thread: the server dies with the thread that started it.
    pub fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("lc-").tempdir_in("/tmp").expect("a temporary folder");
        let mut server = Self { folder, child: None };
        server.restart();
        server
    }

    pub fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Where the server keeps its append-only file.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether the text stands anywhere in the server's files.
    pub fn has_written(&self, text: &str) -> bool {
        let mut paths = vec![self.folder().to_owned()];
        while let Some(path) = paths.pop() {
            let kind = std::fs::symlink_metadata(&path).expect("a file").file_type();
            if kind.is_dir() {
                let entries = std::fs::read_dir(&path).expect("a folder");
                paths.extend(entries.map(|entry| entry.expect("an entry").path()));
            } else if kind.is_file() {
                let bytes = std::fs::read(&path).expect("a file");
                if bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
                    return true;
                }
            }
        }
        false
    }

    pub async fn store(&self) -> Store {
        Store::connect(&self.url(), COMMAND_MAX).await.expect("the store is up")
    }

    /// A connection of the test's own, past everything that the house promises.
    pub async fn raw(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).expect("a valid address");
        client.get_multiplexed_async_connection().await.expect("the store is up")
    }

    /// Kills the server as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("the server can be killed");
            child.wait().expect("the server can be waited for");
        }
    }

    /// Stops the server in its tracks: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        let child = self.child.as_ref().expect("the server runs");
        // SAFETY: the child is ours and has not been waited for, so the number is still its own.
        assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
    }

    /// Starts the server, again if need be, on what it had written.
    pub fn restart(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(self.socket());
        let mut command = Command::new(program());
        command
            .current_dir(self.folder.path())
            .args(["--port", "0", "--save", "", "--appendonly", "yes", "--appendfsync", "always"])
            .args(["--daemonize", "no", "--loglevel", "warning", "--unixsocket"])
            .arg(self.socket())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: prctl is safe to call between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program().display()));
        self.child = Some(child);
        let started = Instant::now();
        while !self.answers() {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "{} ended at once: {ended:?}", program().display());
            assert!(started.elapsed() < START_MAX, "the server did not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn answers(&self) -> bool {
        let Ok(mut stream) = UnixStream::connect(self.socket()) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout can be set");
        let mut answer = [0_u8; 5];
        stream.write_all(b"PING\r\n").is_ok() && stream.read_exact(&mut answer).is_ok() && &answer == b"+PONG"
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("s")
    }
}

impl Drop for Valkey {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The server's program. There is no skipping: a test that cannot run its server fails.
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("LIGHTCONE_TEST_REDIS_SERVER") {
        return path.into();
    }
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join(".lightcone/bin/valkey-server");
    if ours.exists() {
        return ours;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates =
        std::env::split_paths(&path).flat_map(|folder| ["valkey-server", "redis-server"].map(|name| folder.join(name)));
    candidates.find(|candidate| candidate.exists()).expect(
        "no Valkey or Redis server: run `make fetch`, install redis-server, or name one in LIGHTCONE_TEST_REDIS_SERVER",
    )
}
