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
    Arrived, CatalogError, Manifest, Progress, Report, check_name,
    intake::{Intake, Part, Tree, Whole},
    source::HubSource,
};
use crate::model::CONFIG_FILE;

const CONNECT_MAX: Duration = Duration::from_secs(15);
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// A connection that brings nothing for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Tries in a row that bring nothing, before the pull is given up; what has come is kept.
const FRUITLESS_TRIES_MAX: u32 = 4;
const PAUSE_MIN: Duration = Duration::from_millis(250);
/// A folder has a dozen files.
const FILES_MAX: usize = 64;
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
    #[error("{what} has {files} files, more than a model has")]
    TooMany { what: String, files: usize },
    #[error("{what} broke off at {done} of {total} bytes: {why}; the same command goes on from there")]
    Broken { what: String, done: u64, total: u64, why: String },
}

/// A file or a folder of the hub, pinned to a commit.
pub struct Found {
    /// As `pull` would take it again.
    pinned: String,
    name: String,
    is_folder: bool,
    /// The one, or all of the folder's.
    files: Vec<Remote>,
    token: Option<String>,
}

struct Remote {
    name: String,
    url: String,
    bytes: u64,
    sha256: Option<String>,
}

/// What of a repository is meant.
#[derive(Debug, PartialEq)]
enum Choice {
    File(String),
    /// With what is in front of its files' names.
    Folder(String),
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
    let choice = choose(&what, source.file.as_deref(), &files)?;
    let (path, wanted) = match &choice {
        Choice::File(file) => (file.as_str(), vec![file.as_str()]),
        Choice::Folder(prefix) => (prefix.trim_end_matches('/'), files_of(&files, prefix)),
    };
    if wanted.len() > FILES_MAX {
        return Err(HubError::TooMany { what, files: wanted.len() }.into());
    }
    // The commit, not the branch: what follows is all of one moment.
    let repository = api.repo(repo(info.sha.clone()));
    let describe = |file: &&str| {
        let url = repository.url(file);
        let (bytes, sha256) = describe(&api, &what, &url)?;
        Ok(Remote { name: last_part(file).to_owned(), url, bytes, sha256 })
    };
    let place = if path.is_empty() { String::new() } else { format!("/{path}") };
    Ok(Found {
        pinned: format!("hf:{}{place}@{}", source.repository, info.sha),
        name: last_part(if path.is_empty() { &source.repository } else { path }).to_owned(),
        is_folder: matches!(choice, Choice::Folder(_)),
        files: wanted.iter().map(describe).collect::<Result<_, HubError>>()?,
        token,
    })
}

fn choose(what: &str, wanted: Option<&str>, files: &[String]) -> Result<Choice, HubError> {
    let prefix =
        |file: &str| file.strip_suffix(CONFIG_FILE).filter(|p| p.is_empty() || p.ends_with('/')).map(str::to_owned);
    let is_model = |file: &&str| file.ends_with(".gguf") || prefix(file).is_some();
    let choice = |file: &str| prefix(file).map_or_else(|| Choice::File(file.to_owned()), Choice::Folder);
    let models: Vec<&str> = files.iter().map(String::as_str).filter(is_model).collect();
    let candidates = || match models.len() {
        0 => "no models".to_owned(),
        n if n > NAMED_MAX => format!("{} and {} more", models[..NAMED_MAX].join(", "), n - NAMED_MAX),
        _ => models.join(", "),
    };
    match (wanted, &models[..]) {
        (Some(file), _) if files.iter().any(|known| known == file) => Ok(choice(file)),
        (Some(folder), _) if files.contains(&format!("{folder}/{CONFIG_FILE}")) => {
            Ok(Choice::Folder(format!("{folder}/")))
        }
        (Some(file), _) => {
            Err(HubError::NoSuchFile { what: what.to_owned(), file: file.to_owned(), candidates: candidates() })
        }
        (None, [only]) => Ok(choice(only)),
        // At the top of a repository, a folder is what the repository is.
        (None, _) if models.contains(&CONFIG_FILE) && !models.iter().any(|model| model.ends_with(".gguf")) => {
            Ok(Choice::Folder(String::new()))
        }
        (None, _) => Err(HubError::Ambiguous { what: what.to_owned(), candidates: candidates() }),
    }
}

/// The files directly in a folder; what is hidden, or named as no file of ours is, stays there.
fn files_of<'a>(files: &'a [String], prefix: &str) -> Vec<&'a str> {
    let name = |file: &&String| file.strip_prefix(prefix).is_some_and(|name| check_name(name).is_ok());
    files.iter().filter(name).map(String::as_str).collect()
}

fn last_part(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
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
    /// Its own name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pinned(&self) -> &str {
        &self.pinned
    }

    /// Of a file; a folder's is known when it is there.
    pub fn sha256(&self) -> Option<&str> {
        match &self.files[..] {
            [file] if !self.is_folder => file.sha256.as_deref(),
            _ => None,
        }
    }

    /// Of a file that is there already, and has the announced digest.
    pub fn manifest(&self) -> Manifest {
        let bytes = self.files.iter().map(|file| file.bytes).sum();
        Manifest::new(self.pinned.clone(), self.sha256().unwrap_or_default().to_owned(), bytes, true)
    }

    pub fn download(&self, intake: &Intake, report: Report) -> Result<Arrived, CatalogError> {
        // The digests belong to the ticket: a part is only continued with the same bytes.
        let about = |file: &Remote| format!(" {} {}", file.bytes, file.sha256.as_deref().unwrap_or_default());
        let ticket = self.pinned.clone() + &self.files.iter().map(about).collect::<String>();
        let work = intake.work(&ticket)?;
        let whole = if self.is_folder {
            let mut tree = Tree::open(&work)?;
            for file in &self.files {
                if !tree.has(&file.name, file.bytes) {
                    tree.add(&file.name, self.fetched(file, tree.part(file.bytes)?, report)?)?;
                }
            }
            tree.finish()?
        } else {
            self.fetched(&self.files[0], Part::open(&work, self.files[0].bytes)?, report)?
        };
        let is_announced = self.files.iter().all(|file| file.sha256.is_some());
        let manifest = Manifest::new(self.pinned.clone(), whole.sha256.clone(), whole.bytes, is_announced);
        Ok(Arrived { name: self.name.clone(), whole, manifest })
    }

    /// One file, in as many requests as it takes.
    fn fetched(&self, file: &Remote, mut part: Part, report: Report) -> Result<Whole, CatalogError> {
        let agent: Agent = Agent::config_builder()
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_MAX))
            .timeout_recv_response(Some(ANSWER_MAX))
            .timeout_per_read(Some(SILENCE_MAX))
            .build()
            .into();
        let what = || if self.is_folder { format!("{} of {}", file.name, self.pinned) } else { self.pinned.clone() };
        report(Progress { what: &file.name, done: part.done(), total: Some(file.bytes) });
        let mut fruitless = 0;
        while part.missing() > 0 {
            let (done, begun) = (part.done(), Instant::now());
            let why = match self.range(&agent, file, &mut part, report)? {
                Ok(()) => continue,
                Err(why) => why,
            };
            tracing::debug!(url = file.url, done = part.done(), why, took_ms = begun.elapsed().as_millis(), "broken");
            fruitless = if part.done() > done { 0 } else { fruitless + 1 };
            if fruitless == FRUITLESS_TRIES_MAX {
                let (what, done, total) = (what(), part.done(), file.bytes);
                return Err(HubError::Broken { what, done, total, why }.into());
            }
            thread::sleep(PAUSE_MIN * (1 << fruitless));
        }
        part.finish(&what(), file.sha256.as_deref())
    }

    /// One request for all that is missing. The inner error says why not all of it came: worth another try.
    fn range(
        &self,
        agent: &Agent,
        file: &Remote,
        part: &mut Part,
        report: Report,
    ) -> Result<Result<(), String>, CatalogError> {
        let from = part.done();
        let mut request = agent.get(&file.url).header(header::RANGE, format!("bytes={from}-"));
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
            status => return Err(status_fault(self.pinned.clone(), status.as_u16()).into()),
        }
        let mut body = response.into_body().into_reader();
        let taken = part.take(&mut body, &file.name, report)?;
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
        let file = |name: &str| Choice::File(name.to_owned());
        let one = files(&["README.md", "a.gguf"]);
        assert_eq!(choose("r", None, &one).unwrap(), file("a.gguf"));
        assert_eq!(choose("r", Some("README.md"), &one).unwrap(), file("README.md"));
        let two = files(&["a.gguf", "deep/b.gguf"]);
        assert_eq!(choose("r", Some("deep/b.gguf"), &two).unwrap(), file("deep/b.gguf"));
        let error = choose("r", None, &two).unwrap_err().to_string();
        assert!(error.ends_with("it has a.gguf, deep/b.gguf"), "{error}");
        let error = choose("r", Some("c.gguf"), &[]).unwrap_err().to_string();
        assert!(error.ends_with("it has no models"), "{error}");
        let many: Vec<String> = (0..20).map(|i| format!("{i}.gguf")).collect();
        let error = choose("r", None, &many).unwrap_err().to_string();
        assert!(error.ends_with("11.gguf and 8 more"), "{error}");
    }

    #[test]
    fn a_folder_is_chosen_by_its_name_or_its_configuration_and_its_own_files_come() {
        let names = [
            "README.md",
            "cpu/int4/genai_config.json",
            "cpu/int4/model.onnx",
            "cpu/int4/.hidden",
            "cpu/int4/deeper/x",
            "cpu/int4/..",
            "cpu/int4x/y",
            "notgenai_config.json",
        ];
        let files = names.map(str::to_owned);
        let folder = || Choice::Folder("cpu/int4/".to_owned());
        for wanted in [None, Some("cpu/int4"), Some("cpu/int4/genai_config.json")] {
            assert_eq!(choose("r", wanted, &files).unwrap(), folder(), "{wanted:?}");
        }
        assert_eq!(files_of(&files, "cpu/int4/"), ["cpu/int4/genai_config.json", "cpu/int4/model.onnx"]);
        assert_eq!(files_of(&files, ""), ["README.md", "notgenai_config.json"]);
        let error = choose("r", Some("cpu"), &files).unwrap_err().to_string();
        assert!(error.ends_with("it has cpu/int4/genai_config.json"), "{error}");
        let root = ["genai_config.json", "other/genai_config.json"].map(str::to_owned);
        assert_eq!(choose("r", None, &root).unwrap(), Choice::Folder(String::new()));
        let mixed = ["genai_config.json", "a.gguf"].map(str::to_owned);
        assert!(matches!(choose("r", None, &mixed), Err(HubError::Ambiguous { .. })));
    }
}
