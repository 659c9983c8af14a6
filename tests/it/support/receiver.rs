//! A tenant's own server: takes webhooks, checks their signatures, and answers what the test says.

use std::{
    collections::{HashMap, VecDeque},
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

#[derive(Clone, Debug)]
pub struct Arrival {
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Arrival {
    pub fn id(&self) -> &str {
        &self.headers["webhook-id"]
    }

    pub fn payload(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }

    /// As the specification tells receivers to do it.
    pub fn is_signed_with(&self, secret: &str) -> bool {
        let key = STANDARD.decode(secret.strip_prefix("whsec_").expect("a secret")).expect("base64");
        let mut mac = Hmac::<sha2::Sha256>::new_from_slice(&key).expect("any key will do");
        let signed = format!("{}.{}.{}", self.id(), self.headers["webhook-timestamp"], self.body);
        mac.update(signed.as_bytes());
        let expected = format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()));
        self.headers["webhook-signature"].split(' ').any(|signature| signature == expected)
    }
}

#[derive(Clone, Copy)]
pub enum Answer {
    Status(u16),
    /// Elsewhere, to this same server.
    Redirect,
    /// Nothing until the test lets go.
    Held,
}

#[derive(Default)]
struct State {
    arrivals: Mutex<Vec<Arrival>>,
    arrived: Condvar,
    answers: Mutex<VecDeque<Answer>>,
    is_held: Mutex<bool>,
    let_go: Condvar,
    is_over: AtomicBool,
}

/// Closed when dropped.
pub struct Receiver {
    address: SocketAddr,
    state: Arc<State>,
}

impl Receiver {
    pub fn start() -> Self {
        Self::on(([127, 0, 0, 1], 0).into())
    }

    pub fn on(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State { is_held: Mutex::new(true), ..State::default() });
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.is_over.load(Ordering::Relaxed) {
                    return;
                }
                let state = Arc::clone(&shared);
                thread::spawn(move || serve(stream, &state));
            }
        });
        Self { address, state }
    }

    /// An address at which nobody listens, for now.
    pub fn nowhere() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
    }

    pub fn url(&self) -> String {
        url_of(self.address)
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What is answered next, in order; then 204.
    pub fn answer(&self, answers: impl IntoIterator<Item = Answer>) {
        self.state.answers.lock().unwrap().extend(answers);
    }

    pub fn let_go(&self) {
        *self.state.is_held.lock().unwrap() = false;
        self.state.let_go.notify_all();
    }

    pub fn arrivals(&self) -> Vec<Arrival> {
        self.state.arrivals.lock().unwrap().clone()
    }

    /// Waits for so many.
    pub async fn wait_for(&self, count: usize) -> Vec<Arrival> {
        let state = Arc::clone(&self.state);
        let wait = move || {
            let begun = Instant::now();
            let mut arrivals = state.arrivals.lock().unwrap();
            while arrivals.len() < count {
                assert!(begun.elapsed() < SOON, "{} of {count} have arrived: {arrivals:?}", arrivals.len());
                arrivals = state.arrived.wait_timeout(arrivals, Duration::from_secs(1)).unwrap().0;
            }
            arrivals.clone()
        };
        tokio::task::spawn_blocking(wait).await.expect("all have arrived")
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::Relaxed);
        self.let_go();
        let _ = TcpStream::connect(self.address);
    }
}

pub fn url_of(address: SocketAddr) -> String {
    format!("http://{address}/hooks?of=lightcone")
}

fn serve(mut stream: TcpStream, state: &State) {
    let mut lines = BufReader::new(stream.try_clone().expect("a stream"));
    let mut request = String::new();
    if lines.read_line(&mut request).unwrap_or(0) == 0 {
        return;
    }
    assert_eq!(request.trim_end(), "POST /hooks?of=lightcone HTTP/1.1");
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).expect("a header");
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let mut body = vec![0; headers["content-length"].parse().expect("a length")];
    lines.read_exact(&mut body).expect("a body");
    let answer = state.answers.lock().unwrap().pop_front().unwrap_or(Answer::Status(204));
    state.arrivals.lock().unwrap().push(Arrival { headers, body: String::from_utf8(body).expect("UTF-8") });
    state.arrived.notify_all();
    let head = match answer {
        Answer::Status(status) => format!("HTTP/1.1 {status} Whatever"),
        Answer::Redirect => "HTTP/1.1 307 Elsewhere\r\nlocation: /hooks?of=lightcone".to_owned(),
        Answer::Held => {
            let held = state.is_held.lock().unwrap();
            drop(state.let_go.wait_while(held, |is_held| *is_held).unwrap());
            "HTTP/1.1 204 At last".to_owned()
        }
    };
    // Whoever asked may be gone.
    let _ = write!(stream, "{head}\r\ncontent-length: 0\r\n\r\n");
}
