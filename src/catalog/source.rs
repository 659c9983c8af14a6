//! Where a model comes from, as people write it.

use std::{fmt, path::PathBuf, str::FromStr};

use super::CatalogError;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Hub(HubSource),
    Local(PathBuf),
    Package(Package),
}

/// `hf:owner/name[/file][@revision]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSource {
    /// `owner/name`
    pub repository: String,
    /// Its path in the repository; the only model there where absent.
    pub file: Option<String>,
    /// A branch, a tag or a commit.
    pub revision: Option<String>,
}

/// `pypi:name[==version]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: Option<String>,
}

impl FromStr for Source {
    type Err = CatalogError;

    fn from_str(text: &str) -> Result<Self, CatalogError> {
        let fault = |why| CatalogError::Source { text: text.to_owned(), why };
        if let Some(rest) = text.strip_prefix("hf:") {
            return hub(rest).map(Self::Hub).ok_or_else(|| fault("write hf:owner/name[/file][@revision]"));
        }
        if let Some(rest) = text.strip_prefix("pypi:") {
            return package(rest).map(Self::Package).ok_or_else(|| fault("write pypi:name[==version]"));
        }
        let path = PathBuf::from(text);
        if path.exists() {
            return Ok(Self::Local(path));
        }
        Err(fault("there is no such file, and it begins with neither hf: nor pypi:"))
    }
}

impl fmt::Display for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repository)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pypi:{}", self.requirement())
    }
}

impl Package {
    /// As pip takes it.
    pub fn requirement(&self) -> String {
        self.version.as_ref().map_or_else(|| self.name.clone(), |version| format!("{}=={version}", self.name))
    }
}

fn hub(text: &str) -> Option<HubSource> {
    let (path, revision) = match text.split_once('@') {
        Some((path, revision)) => (path, Some(revision)),
        None => (text, None),
    };
    let parts: Vec<&str> = path.split('/').collect();
    let sound = parts.len() >= 2 && parts.iter().all(|part| is_segment(part));
    let revision_sound = revision.is_none_or(|revision| revision.split('/').all(is_segment));
    (sound && revision_sound).then(|| HubSource {
        repository: parts[..2].join("/"),
        file: (parts.len() > 2).then(|| parts[2..].join("/")),
        revision: revision.map(str::to_owned),
    })
}

/// One part of a path, of which nothing needs to be quoted in an address.
fn is_segment(part: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+=".contains(c);
    !part.is_empty() && part != "." && part != ".." && part.chars().all(plain)
}

fn package(text: &str) -> Option<Package> {
    let (name, version) = match text.split_once("==") {
        Some((name, version)) => (name, Some(version)),
        None => (text, None),
    };
    let is_edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let sound = name.chars().all(plain) && is_edge(name.chars().next()) && is_edge(name.chars().next_back());
    let version_sound = version.is_none_or(|version| {
        is_edge(version.chars().next()) && version.chars().all(|c| plain(c) || c == '+' || c == '!')
    });
    (sound && version_sound).then(|| Package { name: name.to_owned(), version: version.map(str::to_owned) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_they_are_written() {
        for text in
            ["hf:o/n", "hf:o/n/a.gguf", "hf:o/n/deep/a.gguf@refs/pr/1", "hf:o/n@v1.0", "pypi:a-b", "pypi:a==1.0"]
        {
            let shown = match text.parse().unwrap() {
                Source::Hub(hub) => hub.to_string(),
                Source::Package(package) => package.to_string(),
                Source::Local(path) => panic!("{}", path.display()),
            };
            assert_eq!(shown, text);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(path.parse::<Source>().unwrap(), Source::Local(folder.path().to_owned()));
    }

    #[test]
    fn what_would_leave_the_repository_or_reach_pip_as_an_option_is_refused() {
        let bad = [
            "hf:",
            "hf:o",
            "hf:o/",
            "hf:/n",
            "hf:o/../n",
            "hf:o/n/../x",
            "hf:o/n?x",
            "hf:o/n@",
            "hf:o/n@a b",
            "hf:o/n/%2e",
            "pypi:",
            "pypi:-r",
            "pypi:a==",
            "pypi:a==-r",
            "pypi:a>=1",
            "pypi:a b",
            "pypi:a[x]",
            "/no/such/file",
            "http://x/y",
        ];
        for text in bad {
            assert!(matches!(text.parse::<Source>(), Err(CatalogError::Source { .. })), "{text}");
        }
    }
}
