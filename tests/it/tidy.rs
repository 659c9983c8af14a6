//! The house rules that a compiler does not know: which room may know which, where names of keys and metrics
//! live, how long a file may be, that every configuration key is explained.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const FILE_LINES_MAX: usize = 700;

/// Which rooms a room may name, besides itself. Arrows point down the house: main, cli, node,
/// {edge, cluster}, operator, {prompt, admission, queue, engine, ledger, journal, webhooks}, grammar, {store, telemetry, model},
/// domain.
/// The edge and the engine never meet. `config` is read above the third floor only; what lies below is
/// given plain values.
const ARROWS: [(&str, &str); 25] = [
    ("lib", ""),
    ("main", "cli"),
    (
        "cli",
        "node config catalog edge cluster operator prompt admission queue engine grammar ledger directory store telemetry \
         model webhooks fault domain",
    ),
    (
        "node",
        "config edge cluster operator prompt admission queue records engine grammar ledger journal webhooks directory store \
         telemetry model domain",
    ),
    ("edge", "config operator prompt admission queue records ledger webhooks directory store telemetry model domain"),
    ("cluster", "config prompt queue engine grammar ledger journal directory store telemetry model domain"),
    ("operator", "config admission ledger webhooks store fault domain"),
    ("prompt", "grammar model telemetry domain"),
    ("admission", "store telemetry fault domain"),
    ("queue", "store telemetry fault domain"),
    ("records", "store domain"),
    ("engine", "grammar model telemetry domain"),
    ("grammar", "model domain"),
    ("ledger", "store telemetry fault domain"),
    ("journal", "fault domain"),
    ("directory", "store telemetry domain"),
    ("webhooks", "store telemetry fault domain"),
    ("store", "child telemetry domain"),
    ("telemetry", "domain"),
    ("model", "domain"),
    ("catalog", "child model domain"),
    ("config", "domain"),
    ("child", ""),
    ("fault", ""),
    ("domain", ""),
];

#[test]
fn rooms_know_only_the_rooms_below_them() {
    let arrows: BTreeMap<_, _> = ARROWS.into_iter().collect();
    let mut faults = Vec::new();
    for source in sources("src") {
        let room = room_of(&source.path);
        let Some(allowed) = arrows.get(room.as_str()) else {
            faults.push(format!("{}: room `{room}` has no place in ARROWS", source.path.display()));
            continue;
        };
        // The thin binary sees the crate from outside, under its name.
        let root = if room == "main" { "lightcone" } else { "crate" };
        for named in rooms_named(&source.code, root) {
            let is_room = arrows.contains_key(named.as_str());
            if is_room && named != room && !allowed.split(' ').any(|known| known == named) {
                faults.push(format!("{}: `{room}` must not know `{named}`", source.path.display()));
            }
        }
        if squeeze(&source.code).contains("super::super::") {
            faults.push(format!("{}: write crate::… instead of super::super::…", source.path.display()));
        }
    }
    assert_none(faults);
}

#[test]
fn only_the_store_names_redis_keys() {
    let law = Path::new("src/store/keys.rs");
    let is_key = |text: &str| text.starts_with("lc:") || text.contains("{m:") || text.contains("{t:");
    let mut faults = Vec::new();
    for source in sources("src").into_iter().filter(|source| source.path != law) {
        for text in source.strings.iter().filter(|text| is_key(text)) {
            faults.push(format!("{}: names a Redis key: {text:?}", source.path.display()));
        }
    }
    // Functions are given their keys, which is what lets them run on a cluster.
    for path in files("src", &["lua"]) {
        if read(&path).contains("lc:") {
            faults.push(format!("{}: names a Redis key", path.display()));
        }
    }
    assert_none(faults);
}

#[test]
fn metrics_are_named_in_one_file() {
    let law = Path::new("src/telemetry/metrics.rs");
    let is_metric = |text: &&String| {
        let name = text.strip_prefix("lightcone_");
        name.is_some_and(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    };
    let mut faults = Vec::new();
    for source in sources("src").into_iter().filter(|source| source.path != law) {
        for text in source.strings.iter().filter(is_metric) {
            faults.push(format!("{}: names the metric {text:?}", source.path.display()));
        }
    }
    assert_none(faults);
}

#[test]
fn nothing_is_left_for_later() {
    let unfinished = ["todo!", "unimplemented!", "dbg!", "#[ignore"];
    let mut faults = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")).chain(sources("load-tests")) {
        let code = squeeze(&source.code);
        for word in unfinished.iter().filter(|word| code.contains(**word)) {
            faults.push(format!("{}: {word}", source.path.display()));
        }
    }
    assert_none(faults);
}

#[test]
fn every_file_can_be_read_in_one_sitting() {
    let mut faults = Vec::new();
    for folder in ["src", "tests", "load-tests", "scripts"] {
        for path in files(folder, &["rs", "lua", "py", "sh", "mjs"]) {
            let lines = read(&path).lines().count();
            if lines > FILE_LINES_MAX {
                faults.push(format!("{}: {lines} lines, at most {FILE_LINES_MAX}", path.display()));
            }
        }
    }
    assert_none(faults);
}

/// A point that stands nowhere makes a test that waits for it pass or fail for the wrong reason, and one that stands in
/// two places makes its passings mean two things.
#[test]
fn every_point_of_failure_stands_in_one_place() {
    const CALL: &str = "fault::point(\"\"";
    let mut placed = BTreeMap::<String, usize>::new();
    for source in sources("src") {
        let code = squeeze(&source.code);
        for (at, _) in code.match_indices(CALL) {
            // Each literal has left two quotation marks, in order.
            let index = code[..at].matches("\"\"").count();
            *placed.entry(source.strings[index].clone()).or_default() += 1;
        }
    }
    let listed = lightcone::fault::POINTS.iter().map(|point| ((*point).to_owned(), 1)).collect();
    assert_eq!(placed, listed, "calls of fault::point in src, and fault::POINTS");
}

#[test]
fn every_room_says_what_it_is_for() {
    let mut faults = Vec::new();
    for path in files("src", &["rs"]) {
        let is_front_door = path.ends_with("mod.rs") || path.parent() == Some(Path::new("src"));
        if is_front_door && !read(&path).starts_with("//!") {
            faults.push(format!("{}: does not begin with a module doc", path.display()));
        }
    }
    assert_none(faults);
}

/// A key is explained by the comment above it, or above the short group that it stands in; keys of a further
/// table of the same kind (a second model) were explained in the first.
#[test]
fn every_configuration_key_is_explained() {
    const GROUP_KEYS_MAX: usize = 3;
    let (mut faults, mut explained) = (Vec::new(), BTreeSet::new());
    let (mut table, mut group) = (String::new(), None);
    for (number, line) in read(Path::new("config/lightcone.toml")).lines().enumerate() {
        if line.starts_with('#') {
            group = Some(0);
        } else if let Some(header) = line.strip_prefix('[') {
            table = header.split(['.', ']']).next().unwrap_or_default().to_owned();
            group = None;
        } else if let Some((key, _)) = line.split_once('=') {
            let key = format!("{table}.{}", key.trim());
            let in_group = group.map(|keys: usize| keys + 1);
            if in_group.is_some_and(|keys| keys <= GROUP_KEYS_MAX) {
                explained.insert(key);
            } else if !explained.contains(&key) {
                faults.push(format!("config/lightcone.toml:{}: {key} has no comment", number + 1));
            }
            group = in_group;
        } else {
            group = None;
        }
    }
    assert!(explained.len() > 20, "the configuration file was not understood");
    assert_none(faults);
}

// --- reading sources --------------------------------------------------------------------------------

struct Source {
    /// Relative to the repository.
    path: PathBuf,
    /// Without comments and without the insides of literals.
    code: String,
    /// The insides of string literals.
    strings: Vec<String>,
}

fn sources(folder: &str) -> Vec<Source> {
    let read_one = |path: PathBuf| {
        let (code, strings) = split_literals(&read(&path));
        Source { path, code, strings }
    };
    files(folder, &["rs"]).into_iter().map(read_one).collect()
}

fn files(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![PathBuf::from(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).expect("folder is readable") {
            let entry = entry.expect("folder is readable");
            let path = folder.join(entry.file_name());
            let is_folder = entry.file_type().expect("has a type").is_dir();
            if is_folder && entry.file_name() != "node_modules" {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extensions.iter().any(|known| extension == *known)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `src/edge/sse.rs` and `src/edge/mod.rs` belong to `edge`, `src/node.rs` to `node`.
fn room_of(path: &Path) -> String {
    let mut parts = path.components().skip(1).map(|part| part.as_os_str().to_string_lossy().into_owned());
    let first = parts.next().expect("path lies in src");
    first.strip_suffix(".rs").unwrap_or(&first).to_owned()
}

/// The first segment of every path that begins at `root`, inside `use root::{…}` as well.
fn rooms_named(code: &str, root: &str) -> BTreeSet<String> {
    let (code, anchor) = (squeeze(code), format!("{root}::"));
    let mut named = BTreeSet::new();
    for (at, _) in code.match_indices(&anchor) {
        if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
            continue;
        }
        let rest = &code[at + anchor.len()..];
        match rest.strip_prefix('{') {
            Some(list) => named.extend(heads_of_list(list)),
            None => named.extend(head(rest)),
        }
    }
    named
}

/// The heads of `a::b, c::{d, e}, f}…`, up to the brace that closes the list.
fn heads_of_list(list: &str) -> Vec<String> {
    let (mut depth, mut heads, mut at_item) = (0, Vec::new(), true);
    for (at, c) in list.char_indices() {
        if at_item && depth == 0 {
            heads.extend(head(&list[at..]));
        }
        at_item = c == ',';
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            _ => {}
        }
    }
    heads
}

fn head(path: &str) -> Option<String> {
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    (end > 0).then(|| path[..end].to_owned())
}

/// Without white space, so that a path is one run of characters however it is formatted.
fn squeeze(code: &str) -> String {
    // A space between two words matters (`use crate`), every other one does not.
    let mut squeezed = String::with_capacity(code.len());
    for word in code.split_whitespace() {
        let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        if is_word(squeezed.chars().next_back()) && is_word(word.chars().next()) {
            squeezed.push(' ');
        }
        squeezed.push_str(word);
    }
    squeezed
}

/// Splits Rust source into code without comments and literals, and the insides of its string literals.
fn split_literals(text: &str) -> (String, Vec<String>) {
    let (mut code, mut strings) = (String::with_capacity(text.len()), Vec::new());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let is_word_before = code.ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if rest.starts_with("//") {
            rest = &rest[rest.find('\n').unwrap_or(rest.len())..];
        } else if rest.starts_with("/*") {
            rest = &rest[block_comment_bytes(rest)..];
        } else if c == '"' {
            let end = quoted_bytes(rest);
            strings.push(rest[1..end - 1].to_owned());
            code.push_str("\"\"");
            rest = &rest[end..];
        } else if let Some((hashes, start)) = raw_string_start(rest).filter(|_| !is_word_before) {
            let close = format!("\"{}", "#".repeat(hashes));
            let end = rest[start..].find(&close).map_or(rest.len(), |at| start + at);
            strings.push(rest[start..end].to_owned());
            code.push_str("\"\"");
            rest = &rest[(end + close.len()).min(rest.len())..];
        } else if let Some(end) = char_literal_bytes(rest) {
            code.push_str("' '");
            rest = &rest[end..];
        } else {
            code.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    (code, strings)
}

fn block_comment_bytes(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match &text.as_bytes()[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn quoted_bytes(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// `r"`, `r#"`, `br##"` and so on: the number of hashes and where the inside begins.
fn raw_string_start(text: &str) -> Option<(usize, usize)> {
    let after = text.strip_prefix("br").or_else(|| text.strip_prefix('r'))?;
    let hashes = after.len() - after.trim_start_matches('#').len();
    after[hashes..].starts_with('"').then(|| (hashes, text.len() - after.len() + hashes + 1))
}

/// A character literal, as opposed to a lifetime.
fn char_literal_bytes(text: &str) -> Option<usize> {
    let inside = text.strip_prefix('\'')?;
    if let Some(escaped) = inside.strip_prefix('\\') {
        let skip = escaped.chars().next()?.len_utf8();
        return escaped[skip..].find('\'').map(|end| 1 + 1 + skip + end + 1);
    }
    let c = inside.chars().next()?;
    inside[c.len_utf8()..].starts_with('\'').then(|| 1 + c.len_utf8() + 1)
}

fn assert_none(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

// --- the reader itself ------------------------------------------------------------------------------

#[test]
fn the_reader_of_sources_sees_paths_and_strings_but_no_comments() {
    let source = r##"
        use crate::{domain::{Job, Claim}, store::
            Store, queue};
        // use crate::edge;  /* "no" */
        fn f<'a>(x: &'a str) -> char { let y = "crate::node \" {m:x}"; let z = r#"raw " text"#; crate :: ledger :: go('"', '\'') }
        /* nested /* crate::cluster */ still */ use mycrate::operator;
    "##;
    let (code, strings) = split_literals(source);
    let named: Vec<_> = rooms_named(&code, "crate").into_iter().collect();
    assert_eq!(named, ["domain", "ledger", "queue", "store"]);
    assert_eq!(strings, [r#"crate::node \" {m:x}"#, r#"raw " text"#]);
}
