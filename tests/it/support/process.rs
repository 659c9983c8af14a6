//! The program itself, as processes of their own: nodes to talk to, to kill and to restart.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use futures::StreamExt;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{model, valkey};

const READY_MAX: Duration = Duration::from_secs(60);
pub const SOON: Duration = Duration::from_secs(20);
pub const SECRET: &str = "the tests' own relay secret";

/// Short leases, a scripted model, and everything in a folder of its own.
pub struct Home {
    folder: tempfile::TempDir,
}

const SCRIPTED: &str = "engine = \"scripted\"\ncontext_tokens_max = 1024\noutput_tokens_max = 512\n\
                        sequences_max = 4\nkv_memory_mib = 1024\n";

impl Home {
    pub fn new(extra: &str) -> Self {
        Self::of_model(SCRIPTED, &format!("[engine]\nstall_ms_max = 1500\n{extra}"))
    }

    /// `model`: lines of the only model's table; `extra`: further sections.
    pub fn of_model(model: &str, extra: &str) -> Self {
        Self::furnished(2000, "", model, extra)
    }

    /// One whose leases last for so many ms, with further lines of the ledger's section.
    pub fn with_leases(lease_ms: u32, ledger: &str, extra: &str) -> Self {
        Self::furnished(lease_ms, ledger, SCRIPTED, &format!("[engine]\nstall_ms_max = 1500\n{extra}"))
    }

    /// One with a queue for a thousand, and leases that do not run out while they wait.
    pub fn of_crowd(ledger: &str, model: &str, extra: &str) -> Self {
        Self::furnished(10_000, ledger, model, extra)
    }

    fn furnished(lease_ms: u32, ledger: &str, model: &str, extra: &str) -> Self {
        let folder = tempfile::Builder::new().prefix("lc-").tempdir_in("/tmp").expect("a temporary folder");
        std::fs::create_dir_all(folder.path().join("data/models")).expect("a folder");
        std::fs::create_dir_all(folder.path().join("data/bin")).expect("a folder");
        let link = |from: PathBuf, to: &str| {
            std::os::unix::fs::symlink(from, folder.path().join("data").join(to)).expect("a link");
        };
        let file = model::model_path();
        link(file.canonicalize().expect("the model"), "models/SmolLM2-135M-Instruct.Q4_1.gguf");
        link(model::data_dir().join("lib").canonicalize().expect("ONNX Runtime"), "lib");
        link(valkey::program().canonicalize().expect("the server"), "bin/valkey-server");
        let config = format!(
            "[node]\nlog = \"info\"\ndrain_ms_max = 4000\n[edge]\nhttp_threads = 1\nauth_failures_max = 0\n\
             [queue]\ndepth_max = 2048\nclaim_lease_ms = {lease_ms}\nwait_ms_max = 30000\n\
             [ledger]\nhold_lease_ms = {lease_ms}\nsweep_ms = 200\n{ledger}\
             [models.\"tzafon.sm-1\"]\n{model}\n[models.\"tzafon.northstar-cua-fast\"]\nenabled = false\n{extra}"
        );
        std::fs::write(folder.path().join("config.toml"), config).expect("a file");
        Self { folder }
    }

    /// Changes the configuration of nodes that start from now on.
    pub fn configure(&self, what: &str, into: &str) {
        let path = self.folder.path().join("config.toml");
        let text = std::fs::read_to_string(&path).expect("a file");
        assert!(text.contains(what), "{what}");
        std::fs::write(path, text.replace(what, into)).expect("a file");
    }

    pub fn data_dir(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn key(&self) -> String {
        std::fs::read_to_string(self.data_dir().join("dev-key")).expect("the key file").trim().to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lightcone"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LIGHTCONE_")) {
            command.env_remove(name);
        }
        command.args(arguments).arg("--config").arg(self.folder.path().join("config.toml"));
        command.arg("--data-dir").arg(self.data_dir());
        command
    }

    /// Runs one operator's command and reads its answer.
    pub fn run(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).args(["--output", "json"]).output().expect("the program runs");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {errors}"))
    }

    /// The same as a person sees it.
    pub fn table(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("the program runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// Runs a command that must fail: its exit code, and what it says.
    pub fn refused(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.command(arguments).args(["--output", "json"]).output().expect("the program runs");
        let errors = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}: {errors}");
        (output.status.code().expect("an exit"), errors)
    }

    /// Runs a command that something happens to at a point in its code; see `lightcone::fault`.
    pub fn armed(&self, arguments: &[&str], fault: &str) -> std::process::ExitStatus {
        self.command(arguments).env("LIGHTCONE_FAULT", fault).output().expect("the program runs").status
    }

    /// Runs one that must fail; answers all that it said.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().expect("the program runs");
        assert!(!output.status.success(), "{arguments:?}");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        text(&output.stdout) + &text(&output.stderr)
    }

    pub fn start(&self, arguments: &[&str]) -> Node {
        self.start_armed(arguments, "")
    }

    /// A node that something happens to at a point in its code; see `lightcone::fault`.
    pub fn start_armed(&self, arguments: &[&str], fault: &str) -> Node {
        let mut serve = vec!["serve", "--listen", "127.0.0.1:0", "--output", "json"];
        serve.extend(arguments);
        let mut command = self.command(&serve);
        if !fault.is_empty() {
            command.env("LIGHTCONE_FAULT", fault);
        }
        command.env("LIGHTCONE_RELAY_SECRET", SECRET).stdin(Stdio::null()).stdout(Stdio::piped());
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("a log");
        command.stderr(log);
        die_with_us(&mut command);
        let mut child = command.spawn().expect("the program runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped"));
        // The first line of its output says that it is ready; the log has its own stream.
        let mut line = String::new();
        let begun = Instant::now();
        let read = lines.read_line(&mut line);
        assert!(read.is_ok() && !line.is_empty(), "{arguments:?} did not start: {}", self.log_text());
        assert!(begun.elapsed() < READY_MAX);
        let facts: Value = serde_json::from_str(&line).expect("JSON");
        let url = facts["url"].as_str().unwrap_or_default().to_owned();
        Node { child, url, http: reqwest::Client::new() }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The charges in the ledger of the development tenant, in order.
    pub fn posts(&self, arguments: &[&str]) -> Vec<Value> {
        let mut list = vec!["ledger", "list", "--tenant", "ten_development", "--limit", "100000"];
        list.extend(arguments);
        let Value::Array(entries) = self.run(&list) else { panic!("a list") };
        entries.into_iter().filter(|entry| entry["kind"] == "post").collect()
    }

    /// Waits until no money is on hold, then checks every entry.
    pub fn assert_settled(&self, arguments: &[&str]) -> Value {
        let mut balance = vec!["balance", "--tenant", "ten_development"];
        balance.extend(arguments);
        let begun = Instant::now();
        let money = loop {
            let money = self.run(&balance);
            if money["held_nano_usd"] == 0 {
                break money;
            }
            assert!(begun.elapsed() < SOON, "a hold is left over: {money}\n{}", self.log_text());
            std::thread::sleep(Duration::from_millis(100));
        };
        let mut verify = vec!["ledger", "verify"];
        verify.extend(arguments);
        let report = self.run(&verify);
        assert_eq!((&report["imbalance_nano_usd"], &report["open_holds"]), (&json!(0), &json!(0)), "{report}");
        money
    }
}

/// A test that fails shows what its nodes had to say.
impl Drop for Home {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of the nodes ---\n{}", self.log_text());
        }
    }
}

/// A node. Killed when dropped.
pub struct Node {
    child: Child,
    pub url: String,
    http: reqwest::Client,
}

impl Node {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).expect("the node is there");
    }

    /// As a crash would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a status").is_none()
    }

    /// Waits for the node's own end; answers its exit code.
    pub fn ended(&mut self) -> Option<i32> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().expect("a status") {
                return status.code();
            }
            assert!(begun.elapsed() < SOON, "the node did not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The embedded store's process.
    pub fn children(&self) -> Vec<u32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("the node is there");
        let read = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.expect("an entry").path().join("children")).unwrap_or_default()
        };
        let children = tasks.map(read).collect::<String>();
        children.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
    }

    /// Asks for a streamed answer to `text`.
    pub async fn ask(&self, key: &str, text: &str, tokens: u32) -> Answer {
        self.try_ask(key, text, tokens).await.expect("an answer")
    }

    /// Nothing where the node is gone before it has answered.
    pub async fn try_ask(&self, key: &str, text: &str, tokens: u32) -> Option<Answer> {
        let body = json!({
            "messages": [{ "role": "user", "content": text }], "max_tokens": tokens, "ignore_eos": true,
            "temperature": 0,
            "stream": true, "stream_options": { "include_usage": true },
        });
        let request = self.http.post(format!("{}/v1/chat/completions", self.url)).bearer_auth(key);
        let response = request.header("content-type", "application/json").body(body.to_string()).send().await;
        let response = response.ok()?;
        let stream = response.headers()["content-type"].as_bytes().starts_with(b"text/event-stream");
        Some(Answer { stream, bytes: response.bytes_stream().boxed(), buffer: String::new() })
    }

    pub async fn ready(&self) -> u16 {
        let answer = self.http.get(format!("{}/readyz", self.url)).send().await;
        answer.map_or(0, |answer| answer.status().as_u16())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Bytes = futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>;

/// A streamed answer, read as it comes.
pub struct Answer {
    /// Otherwise it is one JSON object, an error that was known before the stream began.
    stream: bool,
    bytes: Bytes,
    buffer: String,
}

/// How a stream ended, and what was in it.
#[derive(Debug, Default)]
pub struct Told {
    pub id: Option<String>,
    pub text: String,
    pub finish: Option<String>,
    pub stop_reason: Option<String>,
    pub error: Option<Value>,
    pub usage: Option<Value>,
    /// `[DONE]` came.
    pub done: bool,
    /// Pieces of text, of one token at least.
    pub chunks: u64,
}

impl Answer {
    /// The next `data:` line; `None` at the end.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if !self.stream && self.buffer.ends_with('}') {
                return Some(std::mem::take(&mut self.buffer));
            }
            if let Some(end) = self.buffer.find("\n\n") {
                let event: String = self.buffer.drain(..end + 2).collect();
                match event.trim().strip_prefix("data: ") {
                    Some(data) => return Some(data.to_owned()),
                    None => continue, // a comment
                }
            }
            let next = tokio::time::timeout(SOON, self.bytes.next()).await.expect("the stream goes on");
            self.buffer += std::str::from_utf8(&next?.ok()?).expect("UTF-8");
        }
    }

    /// Waits for the first piece of text, and answers it.
    pub async fn begun(&mut self) -> String {
        while let Some(data) = self.next().await {
            let chunk: Value = serde_json::from_str(&data).expect("JSON");
            if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
                return text.to_owned();
            }
        }
        panic!("the stream ended before its first text");
    }

    pub async fn rest(mut self) -> Told {
        let mut told = Told::default();
        while let Some(data) = self.next().await {
            if data == "[DONE]" {
                told.done = true;
                continue;
            }
            let chunk: Value = serde_json::from_str(&data).expect("JSON");
            if let Some(id) = chunk["id"].as_str() {
                told.id = Some(id.to_owned());
            }
            if !chunk["error"].is_null() {
                told.error = Some(chunk["error"].clone());
            }
            if !chunk["usage"].is_null() {
                told.usage = Some(chunk["usage"].clone());
            }
            let text = chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            told.chunks += u64::from(!text.is_empty());
            told.text += text;
            if let Some(reason) = chunk["choices"][0]["stop_reason"].as_str() {
                told.stop_reason = Some(reason.to_owned());
            }
            if let Some(finish) = chunk["choices"][0]["finish_reason"].as_str() {
                told.finish = Some(finish.to_owned());
            }
        }
        told
    }
}

/// An ordinary Redis (or Valkey) on a TCP port. Killed when dropped.
pub struct Redis {
    child: Child,
    pub url: String,
    port: u16,
    folder: tempfile::TempDir,
}

impl Redis {
    pub fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let child = Self::spawn(port, folder.path());
        Self { child, url: format!("redis://127.0.0.1:{port}"), port, folder }
    }

    fn spawn(port: u16, folder: &Path) -> Child {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let debian = std::env::split_paths(&path).map(|folder| folder.join("redis-server")).find(|file| file.exists());
        let program = debian.unwrap_or_else(valkey::program);
        let mut command = Command::new(&program);
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--save", "", "--appendonly", "yes"]);
        command.arg("--dir").arg(folder).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        die_with_us(&mut command);
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let begun = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(begun.elapsed() < SOON, "the server did not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
        child
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a status").is_none()
    }

    /// As a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The same server again, with what it had written.
    pub fn restart(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.child = Self::spawn(self.port, self.folder.path());
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn is_alive(pid: u32) -> bool {
    let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

/// The kernel kills the process with the test's own thread.
fn die_with_us(command: &mut Command) {
    // SAFETY: prctl is safe to call between fork and exec.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}
