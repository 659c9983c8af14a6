//! A stand-in for a model hub: one repository with one commit, on the loopback, with faults on demand.

use std::{
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the stand-in behaves; changed while it runs.
#[derive(Clone, Default)]
pub struct Manners {
    pub files: Vec<(String, Vec<u8>)>,
    /// Cut each answer of a file's bytes off after so many.
    pub bytes_at_a_time: Option<usize>,
    /// Answer every request for a file's bytes beyond its first with 503.
    pub is_tired: bool,
    /// Announce another digest than that of the bytes.
    pub lies_about_digests: bool,
    /// Send everything from the first byte, whatever was asked for.
    pub knows_no_ranges: bool,
    /// Send files' bytes from another host, as hubs do.
    pub redirects: bool,
    /// Only with this token.
    pub token: Option<String>,
}

/// What was asked: the path, where its range began, and the token.
#[derive(Clone, Debug, PartialEq)]
pub struct Asked {
    pub path: String,
    pub from: Option<usize>,
    pub token: Option<String>,
}

pub struct Hub {
    pub url: String,
    pub manners: Arc<Mutex<Manners>>,
    asked: Arc<Mutex<Vec<Asked>>>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    pub fn start(manners: Manners) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let (manners, asked) = (Arc::new(Mutex::new(manners)), Arc::new(Mutex::new(Vec::new())));
        let is_over = Arc::new(AtomicBool::new(false));
        let (on_thread, log, over) = (Arc::clone(&manners), Arc::clone(&asked), Arc::clone(&is_over));
        let thread = thread::spawn(move || {
            for stream in listener.incoming().take_while(|_| !over.load(SeqCst)).flatten() {
                let manners = on_thread.lock().clone();
                // A client that leaves in the middle is none of our business.
                let _ = answer(stream, port, &manners, &log);
            }
        });
        Self { url: format!("http://127.0.0.1:{port}"), manners, asked, is_over, thread: Some(thread) }
    }

    /// Requests for the bytes of files, but for those of the one byte that tells a file's size.
    pub fn downloads(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.is_over.store(true, SeqCst);
        // Wakes the thread, which then sees that it is over.
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn answer(stream: TcpStream, port: u16, manners: &Manners, log: &Mutex<Vec<Asked>>) -> std::io::Result<()> {
    let mut lines = BufReader::new(&stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut token) = (None, None);
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = Some(value.trim_start_matches("bytes=").to_owned()),
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut out = &stream;
    let mut head = |text: String| write!(out, "HTTP/1.1 {text}Connection: close\r\n\r\n");
    if let Some(wanted) = &manners.token
        && !path.starts_with("/elsewhere/")
        && token.as_deref() != Some(&format!("Bearer {wanted}"))
    {
        return head("401 Unauthorized\r\nContent-Length: 0\r\n".into());
    }
    if path.starts_with("/api/models/owner/name/revision/") {
        if !["main", "v1", COMMIT].iter().any(|known| path.ends_with(&format!("/{known}"))) {
            return head("404 Not Found\r\nContent-Length: 0\r\n".into());
        }
        let files: Vec<_> = manners.files.iter().map(|(name, _)| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": files }).to_string();
        head(format!("200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n", body.len()))?;
        return out.write_all(body.as_bytes());
    }
    let name = path.strip_prefix(&format!("/owner/name/resolve/{COMMIT}/")).or(path.strip_prefix("/elsewhere/"));
    let Some((name, bytes)) = name.and_then(|name| manners.files.iter().find(|(known, _)| known == name)) else {
        return head("404 Not Found\r\nContent-Length: 0\r\n".into());
    };
    let mut digest = hex::encode(Sha256::digest(bytes));
    if manners.lies_about_digests {
        digest = digest.chars().rev().collect();
    }
    let about = format!("x-repo-commit: {COMMIT}\r\nx-linked-etag: \"{digest}\"\r\netag: \"{digest}\"\r\n");
    if manners.redirects && !path.starts_with("/elsewhere/") {
        // Another name of this machine is another host.
        let there = format!("http://localhost:{port}/elsewhere/{name}");
        return head(format!("302 Found\r\n{about}Location: {there}\r\nContent-Length: 0\r\n"));
    }
    let (from, to) = range.as_deref().and_then(|range| range.split_once('-')).unwrap_or(("", ""));
    let (from, to) = (from.parse::<usize>().ok(), to.parse::<usize>().ok());
    if to == Some(0) {
        let size = bytes.len();
        head(format!("206 Partial Content\r\n{about}Content-Range: bytes 0-0/{size}\r\nContent-Length: 1\r\n"))?;
        return out.write_all(&bytes[..1]);
    }
    let is_first = {
        let mut log = log.lock();
        log.push(Asked { path: path.clone(), from, token });
        log.len() == 1
    };
    if manners.is_tired && !is_first {
        return head("503 Service Unavailable\r\nContent-Length: 0\r\n".into());
    }
    let (status, rest, place) = match from {
        Some(from) if !manners.knows_no_ranges => {
            let place = format!("Content-Range: bytes {from}-{}/{}\r\n", bytes.len() - 1, bytes.len());
            ("206 Partial Content", &bytes[from..], place)
        }
        _ => ("200 OK", &bytes[..], String::new()),
    };
    head(format!("{status}\r\n{about}{place}Content-Length: {}\r\n", rest.len()))?;
    out.write_all(&rest[..rest.len().min(manners.bytes_at_a_time.unwrap_or(usize::MAX))])
}
