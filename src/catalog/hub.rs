//! A model out of a hub repository.
//!
//! `hf-hub` knows the hub: its address (`HF_ENDPOINT` names another), the token (`HF_TOKEN`, or the file that
//! the hub's own tools keep), what a repository holds and the digest of a file. The bytes are fetched here,
//! by ranges, so that a broken download goes on where it stopped and never takes more than was announced.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::sync::{Api, ApiBuilder, ApiError},
};
use ureq::{
    Agent,
    config::RedirectAuthHeaders,
    http::{StatusCode, header},
};

use super::{
    Arrived, CatalogError, Manifest, Progress, Report,
    intake::{Intake, Part},
    source::HubSource,
};

const CONNECT_MAX: Duration = Duration::from_secs(15);
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// A connection that brings nothing for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Tries in a row that bring nothing, before the pull is given up; what has come is kept.
const FRUITLESS_TRIES_MAX: u32 = 4;
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// Candidates that a message names.
const NAMED_MAX: usize = 12;

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("{what}: {source}")]
    Api { what: String, source: ApiError },
    #[error("{what}: the hub answers {status}")]
    Status { what: String, status: u16 },
    #[error("{0} was not found on the hub")]
    NotFound(String),
    #[error("{what} is private or gated (the hub answers {status}); give a token in HF_TOKEN")]
    NoAccess { what: String, status: u16 },
    #[error("{what} has no file `{file}`; it has {candidates}")]
    NoSuchFile { what: String, file: String, candidates: String },
    #[error("{what} does not say which model is meant; it has {candidates}")]
    Ambiguous { what: String, candidates: String },
    #[error("{what} broke off at {done} of {total} bytes: {why}; the same command goes on from there")]
    Broken { what: String, done: u64, total: u64, why: String },
}

/// A file of the hub, pinned to a commit.
pub struct Found {
    repository: String,
    file: String,
    commit: String,
    url: String,
    bytes: u64,
    sha256: Option<String>,
    token: Option<String>,
}

/// Asks the hub which file is meant, and what it is.
pub fn find(source: &HubSource) -> Result<Found, CatalogError> {
    let what = source.to_string();
    let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
    let token = token.or_else(|| Cache::from_env().token());
    let api = ApiBuilder::from_env().with_progress(false).with_token(token.clone()).build();
    let api = api.map_err(|error| api_fault(&what, error))?;
    let revision = source.revision.clone().unwrap_or_else(|| "main".to_owned());
    let repo = |revision| Repo::with_revision(source.repository.clone(), RepoType::Model, revision);
    let info = api.repo(repo(revision)).info().map_err(|error| api_fault(&what, error))?;
    let files: Vec<String> = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let file = choose(&what, source.file.as_deref(), &files)?;
    // The commit, not the branch: what follows is all of one moment.
    let url = api.repo(repo(info.sha.clone())).url(&file);
    let (bytes, sha256) = describe(&api, &what, &url)?;
    Ok(Found { repository: source.repository.clone(), file, commit: info.sha, url, bytes, sha256, token })
}

fn choose(what: &str, wanted: Option<&str>, files: &[String]) -> Result<String, HubError> {
    let models: Vec<&str> = files.iter().map(String::as_str).filter(|file| file.ends_with(".gguf")).collect();
    let candidates = || match models.len() {
        0 => "no GGUF files".to_owned(),
        n if n > NAMED_MAX => format!("{} and {} more", models[..NAMED_MAX].join(", "), n - NAMED_MAX),
        _ => models.join(", "),
    };
    match (wanted, &models[..]) {
        (Some(file), _) if files.iter().any(|known| known == file) => Ok(file.to_owned()),
        (Some(file), _) => {
            Err(HubError::NoSuchFile { what: what.to_owned(), file: file.to_owned(), candidates: candidates() })
        }
        (None, [only]) => Ok((*only).to_owned()),
        (None, _) => Err(HubError::Ambiguous { what: what.to_owned(), candidates: candidates() }),
    }
}

/// Size and, where the hub has one, SHA-256: it calls large files by it.
fn describe(api: &Api, what: &str, url: &str) -> Result<(u64, Option<String>), HubError> {
    let metadata = api.metadata(url).map_err(|error| api_fault(what, error))?;
    let etag = metadata.etag();
    let is_sha256 = etag.len() == 64 && etag.bytes().all(|c| c.is_ascii_hexdigit());
    Ok((metadata.size() as u64, is_sha256.then(|| etag.to_ascii_lowercase())))
}

fn api_fault(what: &str, error: ApiError) -> HubError {
    let what = what.to_owned();
    match &error {
        ApiError::RequestError(inner) => match **inner {
            ureq::Error::StatusCode(status) => status_fault(what, status),
            _ => HubError::Api { what, source: error },
        },
        _ => HubError::Api { what, source: error },
    }
}

fn status_fault(what: String, status: u16) -> HubError {
    match status {
        404 => HubError::NotFound(what),
        // To those who may not see it, the hub does not tell a private repository from one that is not there.
        401 | 403 => HubError::NoAccess { what, status },
        status => HubError::Status { what, status },
    }
}

impl Found {
    /// The file's own name.
    pub fn name(&self) -> &str {
        self.file.rsplit('/').next().unwrap_or(&self.file)
    }

    pub fn sha256(&self) -> Option<&str> {
        self.sha256.as_deref()
    }

    /// Of a file that is there already, and has the announced digest.
    pub fn manifest(&self) -> Manifest {
        Manifest::new(self.pinned(), self.sha256.clone().unwrap_or_default(), self.bytes, true)
    }

    fn pinned(&self) -> String {
        format!("hf:{}/{}@{}", self.repository, self.file, self.commit)
    }

    pub fn download(&self, intake: &Intake, report: Report) -> Result<Arrived, CatalogError> {
        // The digest belongs to the ticket: a part is only continued with the same bytes.
        let ticket = format!("{} {} {}", self.pinned(), self.bytes, self.sha256().unwrap_or_default());
        let mut part = Part::open(&intake.work(&ticket)?, self.bytes)?;
        let agent: Agent = Agent::config_builder()
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_MAX))
            .timeout_recv_response(Some(ANSWER_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .build()
            .into();
        report(Progress { what: self.name(), done: part.done(), total: Some(self.bytes) });
        let mut fruitless = 0;
        while part.missing() > 0 {
            let (done, begun) = (part.done(), Instant::now());
            let why = match self.range(&agent, &mut part, report)? {
                Ok(()) => continue,
                Err(why) => why,
            };
            tracing::debug!(url = self.url, done = part.done(), why, took_ms = begun.elapsed().as_millis(), "broken");
            fruitless = if part.done() > done { 0 } else { fruitless + 1 };
            if fruitless == FRUITLESS_TRIES_MAX {
                let (what, done, total) = (self.pinned(), part.done(), self.bytes);
                return Err(HubError::Broken { what, done, total, why }.into());
            }
            thread::sleep(PAUSE_MIN * (1 << fruitless));
        }
        let whole = part.finish(&self.pinned(), self.sha256())?;
        let manifest = Manifest::new(self.pinned(), whole.sha256.clone(), whole.bytes, self.sha256.is_some());
        Ok(Arrived { name: self.name().to_owned(), whole, manifest })
    }

    /// One request for all that is missing. The inner error says why not all of it came: worth another try.
    fn range(&self, agent: &Agent, part: &mut Part, report: Report) -> Result<Result<(), String>, CatalogError> {
        let from = part.done();
        let mut request = agent.get(&self.url).header(header::RANGE, format!("bytes={from}-"));
        // Ranges are of the bytes as they are.
        request = request.header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let starts = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let starts_there = starts.is_some_and(|range| range.starts_with(&format!("bytes {from}-")));
        match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_there => {}
            // A server without ranges sends everything, from the first byte.
            StatusCode::OK => part.restart()?,
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Ok(Err(format!("the hub answers {}", status.as_u16())));
            }
            status => return Err(status_fault(self.pinned(), status.as_u16()).into()),
        }
        let mut body = response.into_body().into_reader();
        let taken = part.take(&mut body, self.name(), report)?;
        Ok(taken.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "the connection ended".to_owned(),
            _ => error.to_string(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_only_model_is_chosen_and_candidates_are_named() {
        let files = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let one = files(&["README.md", "a.gguf"]);
        assert_eq!(choose("r", None, &one).unwrap(), "a.gguf");
        assert_eq!(choose("r", Some("README.md"), &one).unwrap(), "README.md");
        let two = files(&["a.gguf", "deep/b.gguf"]);
        assert_eq!(choose("r", Some("deep/b.gguf"), &two).unwrap(), "deep/b.gguf");
        let error = choose("r", None, &two).unwrap_err().to_string();
        assert!(error.ends_with("it has a.gguf, deep/b.gguf"), "{error}");
        let error = choose("r", Some("c.gguf"), &[]).unwrap_err().to_string();
        assert!(error.ends_with("it has no GGUF files"), "{error}");
        let many: Vec<String> = (0..20).map(|i| format!("{i}.gguf")).collect();
        let error = choose("r", None, &many).unwrap_err().to_string();
        assert!(error.ends_with("11.gguf and 8 more"), "{error}");
    }
}
