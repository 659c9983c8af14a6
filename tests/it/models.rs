//! `lightcone models`, as its users run it: a hub on the loopback, packages in a folder, files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::support::{
    genai::{LAYOUTS, small_folder},
    gguf::small_model,
    hub::{COMMIT, Hub, Manners},
    model,
};

/// A data folder of its own, and a configuration that uses `used.gguf`.
struct Place {
    folder: tempfile::TempDir,
    env: Vec<(String, String)>,
}

struct Done {
    code: Option<i32>,
    answer: Value,
    errors: String,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let config = "[models.\"tzafon.sm-1\"]\nfile = \"used.gguf\"\n\
                      [models.\"tzafon.northstar-cua-fast\"]\nenabled = false\n";
        fs::write(folder.path().join("config.toml"), config).expect("a file");
        // No hub but the test's, and no package index at all.
        let none = [("HF_ENDPOINT", "http://127.0.0.1:1"), ("PIP_NO_INDEX", "1"), ("HF_TOKEN", "")];
        let mut env: Vec<_> = none.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        env.push(("HF_HOME".into(), folder.path().join("hf").display().to_string()));
        Self { folder, env }
    }

    fn set(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    fn run(&self, arguments: &[&str]) -> Done {
        self.lightcone(&[&["models"], arguments].concat())
    }

    fn lightcone(&self, arguments: &[&str]) -> Done {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lightcone"));
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("LIGHTCONE_")) {
            command.env_remove(name);
        }
        command.args(arguments).args(["--output", "json", "--config"]);
        command.arg(self.folder.path().join("config.toml")).arg("--data-dir").arg(self.folder.path());
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        let output = command.output().expect("the program runs");
        let answer = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
        Done { code: output.status.code(), answer, errors: String::from_utf8_lossy(&output.stderr).into_owned() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("models").join(name)
    }

    /// Everything in the catalogue, hidden work aside.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.file("")).expect("the catalogue");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

fn hub_with(bytes: &[u8]) -> (Hub, Place) {
    let files = vec![("README.md".to_owned(), b"read me".to_vec()), ("small.gguf".to_owned(), bytes.to_vec())];
    let hub = Hub::start(Manners { files, ..Manners::default() });
    let mut place = Place::new();
    place.set("HF_ENDPOINT", &hub.url);
    (hub, place)
}

#[test]
fn a_model_comes_from_the_hub_in_spite_of_a_connection_that_breaks_again_and_again() {
    let bytes = small_model(3).encode();
    let (hub, mut place) = hub_with(&bytes);
    {
        let mut manners = hub.manners.lock();
        manners.bytes_at_a_time = Some(20_000);
        manners.redirects = true;
        manners.token = Some("secret".into());
    }
    place.set("HF_TOKEN", "secret");
    let done = place.run(&["pull", "hf:owner/name"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    let source = format!("hf:owner/name/small.gguf@{COMMIT}");
    assert_eq!(done.answer["source"], json!(source));
    assert_eq!(done.answer["sha256"], json!(sha256(&bytes)));
    assert_eq!(done.answer["architecture"], json!("llama"));
    assert_eq!(done.answer["quantisation"], json!("Q4_1"));
    assert_eq!(done.answer["fault"], Value::Null);
    assert_eq!(fs::read(place.file("small.gguf")).unwrap(), bytes);
    assert_eq!(place.names(), ["small.gguf", "small.gguf.manifest.json"]);
    // Each request went on where the last one was cut off, and the other host never saw the token.
    let elsewhere: Vec<_> = hub.downloads().into_iter().filter(|asked| asked.path.starts_with("/elsewhere")).collect();
    let starts: Vec<_> = elsewhere.iter().map(|asked| asked.from.unwrap()).collect();
    assert_eq!(starts, (0..bytes.len()).step_by(20_000).collect::<Vec<_>>());
    assert!(elsewhere.iter().all(|asked| asked.token.is_none()), "{elsewhere:?}");
    // What is there already is not fetched again.
    let asked = hub.downloads().len();
    assert_eq!(place.run(&["pull", "hf:owner/name/small.gguf@v1"]).code, Some(0));
    assert_eq!(hub.downloads().len(), asked);
}

#[test]
fn a_pull_that_was_given_up_goes_on_in_the_next_process() {
    let bytes = small_model(0).encode();
    let (hub, place) = hub_with(&bytes);
    (hub.manners.lock().bytes_at_a_time, hub.manners.lock().is_tired) = (Some(30_000), true);
    let done = place.run(&["pull", "hf:owner/name"]);
    assert_eq!(done.code, Some(1));
    let said = format!("broke off at 30000 of {} bytes: the hub answers 503", bytes.len());
    assert!(done.errors.contains(&said), "{}", done.errors);
    assert!(place.names().is_empty());
    // Longer than the part that is missing, so that it is one more request.
    (hub.manners.lock().bytes_at_a_time, hub.manners.lock().is_tired) = (None, false);
    let before = hub.downloads().len();
    let done = place.run(&["pull", "hf:owner/name"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    let starts: Vec<_> = hub.downloads()[before..].iter().map(|asked| asked.from).collect();
    assert_eq!(starts, [Some(30_000)]);
    assert_eq!(fs::read(place.file("small.gguf")).unwrap(), bytes);
    assert!(!place.file(".pull/work").exists());
}

#[test]
fn a_server_without_ranges_is_read_from_the_first_byte() {
    let bytes = small_model(2).encode();
    let (hub, place) = hub_with(&bytes);
    hub.manners.lock().bytes_at_a_time = Some(9000);
    hub.manners.lock().is_tired = true;
    assert_eq!(place.run(&["pull", "hf:owner/name"]).code, Some(1));
    hub.manners.lock().knows_no_ranges = true;
    (hub.manners.lock().bytes_at_a_time, hub.manners.lock().is_tired) = (None, false);
    let done = place.run(&["pull", "hf:owner/name"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(fs::read(place.file("small.gguf")).unwrap(), bytes);
}

#[test]
fn what_the_hub_refuses_or_gets_wrong_is_one_clear_line_and_nothing_is_placed() {
    let (hub, place) = hub_with(&small_model(3).encode());
    let fails = |arguments: &[&str], code: i32, said: &str| {
        let done = place.run(&[&["pull"], arguments].concat());
        assert_eq!(done.code, Some(code), "{arguments:?}: {}", done.errors);
        assert!(done.errors.contains(said), "{arguments:?}: {}", done.errors);
        assert_eq!(done.errors.trim_end().lines().count(), 1, "{}", done.errors);
        assert!(place.names().is_empty());
    };
    fails(&["hf:owner/nothing"], 1, "hf:owner/nothing was not found on the hub");
    fails(&["hf:owner/name@v2"], 1, "hf:owner/name@v2 was not found on the hub");
    fails(&["hf:owner/name/other.gguf"], 1, "has no file `other.gguf`; it has small.gguf");
    fails(&["hf:owner/name/README.md"], 5, "is not a model that can be served: not a GGUF file");
    fails(&["hf:owner"], 2, "write hf:owner/name");
    fails(&["http://127.0.0.1/x.gguf"], 2, "it begins with neither hf: nor pypi:");
    fails(&["hf:owner/name", "--name", "../x.gguf"], 2, "cannot be the name of a model");
    hub.manners.lock().token = Some("secret".into());
    fails(&["hf:owner/name"], 1, "is private or gated (the hub answers 401); give a token in HF_TOKEN");
    hub.manners.lock().token = None;
    hub.manners.lock().lies_about_digests = true;
    fails(&["hf:owner/name"], 1, "was announced; it was thrown away");
}

#[test]
fn files_are_listed_with_who_uses_them_and_removed_only_when_nobody_does() {
    let place = Place::new();
    let (plain, quantised) = (small_model(0).encode(), small_model(8).encode());
    let source = place.folder.path().join("mine.gguf");
    fs::write(&source, &plain).unwrap();
    let source = source.to_str().unwrap();
    assert_eq!(place.run(&["pull", source, "--name", "used.gguf"]).code, Some(0));
    let done = place.run(&["pull", source]);
    assert_eq!((done.code, done.answer["name"].as_str()), (Some(0), Some("mine.gguf")), "{}", done.errors);
    // The same bytes again are no fault; other bytes are, unless they are meant.
    assert_eq!(place.run(&["pull", source]).code, Some(0));
    fs::write(source, &quantised).unwrap();
    let done = place.run(&["pull", source]);
    assert_eq!(done.code, Some(1));
    assert!(done.errors.contains("another model `mine.gguf` in the catalogue"), "{}", done.errors);
    assert_eq!(place.run(&["pull", source, "--force"]).code, Some(0));
    fs::write(place.file("broken.gguf"), &plain[..1000]).unwrap();

    let listed = place.run(&["list"]).answer;
    let column = |name: &str| listed.as_array().unwrap().iter().map(|row| row[name].clone()).collect::<Vec<_>>();
    assert_eq!(column("name"), ["broken.gguf", "mine.gguf", "used.gguf"]);
    assert_eq!(column("quantisation"), [json!(null), json!("Q8_0"), json!("F32")]);
    assert_eq!(column("sha256"), [json!(null), json!(sha256(&quantised)), json!(sha256(&plain))]);
    assert_eq!(column("used_by"), [json!([]), json!([]), json!(["tzafon.sm-1"])]);
    assert_eq!(column("parameters")[1], column("parameters")[2]);
    assert!(column("fault")[0].as_str().unwrap().contains("truncated"), "{listed}");

    let done = place.run(&["rm", "used.gguf"]);
    assert_eq!(done.code, Some(1));
    assert!(done.errors.contains("`used.gguf` is used by tzafon.sm-1"), "{}", done.errors);
    for arguments in [&["rm", "mine.gguf"][..], &["rm", "broken.gguf"], &["rm", "used.gguf", "--force"]] {
        assert_eq!(place.run(arguments).code, Some(0), "{arguments:?}");
    }
    assert!(place.names().is_empty());
    for name in ["mine.gguf", "../config.toml", ".pull", ""] {
        assert_eq!(place.run(&["rm", name]).code, Some(2), "{name}");
    }
    // What is configured and missing is listed as well.
    let listed = place.run(&["list"]).answer;
    assert_eq!(listed[0]["name"], "used.gguf");
    assert!(listed[0]["fault"].as_str().unwrap().contains("cannot read"), "{listed}");
}

/// Makes wheels with Python's own means.
fn wheel(folder: &Path, name: &str, requires: &[&str], files: &[(&str, &[u8])]) {
    let script = "import sys, zipfile, json, pathlib\n\
                  facts = json.load(sys.stdin)\n\
                  wheel = zipfile.ZipFile(facts['path'], 'w')\n\
                  for name, path in facts['files']: wheel.write(path, name)\n\
                  for name, text in facts['texts']: wheel.writestr(name, text)\n\
                  wheel.close()\n";
    let under = name.replace('-', "_");
    let info = format!("{under}-1.0.dist-info");
    let mut metadata = format!("Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n");
    requires.iter().for_each(|required| metadata += &format!("Requires-Dist: {required}\n"));
    let stored: Vec<_> = files
        .iter()
        .enumerate()
        .map(|(at, (member, bytes))| {
            let path = folder.join(format!("{under}-{at}.bin"));
            fs::write(&path, bytes).expect("a file");
            json!([format!("{under}/{member}"), path])
        })
        .collect();
    let facts = json!({
        "path": folder.join(format!("{under}-1.0-py3-none-any.whl")),
        "files": stored,
        "texts": [
            [format!("{info}/METADATA"), metadata + "\nText.\n"],
            [format!("{info}/WHEEL"), "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"],
            [format!("{info}/RECORD"), ""],
        ],
    });
    let mut command = Command::new(std::env::var("PYTHON").unwrap_or("python3".into()));
    let mut python = command.args(["-c", script]).stdin(std::process::Stdio::piped()).spawn().expect("Python");
    serde_json::to_writer(python.stdin.take().expect("piped"), &facts).expect("it listens");
    assert!(python.wait().expect("it ends").success());
}

#[test]
fn a_model_comes_out_of_a_package_whole_or_in_parts_and_is_held_against_its_digest() {
    let bytes = small_model(3).encode();
    let mut place = Place::new();
    let index = tempfile::tempdir().unwrap();
    place.set("PIP_FIND_LINKS", index.path().to_str().unwrap());
    wheel(index.path(), "whole-model", &["something-else==3"], &[("data/whole.gguf", &bytes)]);
    let done = place.run(&["pull", "pypi:whole-model"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(done.answer["source"], json!("pypi:whole-model==1.0"));
    assert_eq!(fs::read(place.file("whole.gguf")).unwrap(), bytes);

    let sums = format!("{}  parted.gguf\n", sha256(&bytes));
    wheel(
        index.path(),
        "parted-model",
        &["parted-model-part1==1.0", "parted_model_part2==1.0", "something-else==3"],
        &[("SHA256SUMS", sums.as_bytes())],
    );
    let (first, rest) = bytes.split_at(bytes.len() / 2);
    let (second, third) = rest.split_at(1000);
    wheel(index.path(), "parted-model-part1", &[], &[("parted.gguf.part00", first)]);
    // The second part is not to be had yet.
    let done = place.run(&["pull", "pypi:parted-model"]);
    assert_eq!(done.code, Some(1));
    assert!(done.errors.contains("pip could not download parted_model_part2==1.0"), "{}", done.errors);
    assert!(place.file(".pull/work/model").exists());
    wheel(index.path(), "parted-model-part2", &[], &[("parted.gguf.part02", third), ("parted.gguf.part01", second)]);
    // What has come is not fetched again, so that it may be gone.
    fs::remove_file(index.path().join("parted_model_part1-1.0-py3-none-any.whl")).unwrap();
    let done = place.run(&["pull", "pypi:parted-model==1.0"]);
    assert_eq!(done.code, Some(1), "another requirement is other work");
    wheel(index.path(), "parted-model-part1", &[], &[("parted.gguf.part00", first)]);
    fs::remove_file(index.path().join("parted_model_part2-1.0-py3-none-any.whl")).unwrap();
    assert_eq!(place.run(&["pull", "pypi:parted-model"]).code, Some(1));
    fs::remove_file(index.path().join("parted_model_part1-1.0-py3-none-any.whl")).unwrap();
    wheel(index.path(), "parted-model-part2", &[], &[("parted.gguf.part02", third), ("parted.gguf.part01", second)]);
    let done = place.run(&["pull", "pypi:parted-model"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(fs::read(place.file("parted.gguf")).unwrap(), bytes);

    wheel(
        index.path(),
        "lying-model",
        &[],
        &[("m.gguf", &bytes), ("SHA256SUMS", format!("{:0>64}  m.gguf\n", 7).as_bytes())],
    );
    let done = place.run(&["pull", "pypi:lying-model"]);
    assert_eq!(done.code, Some(1));
    assert!(done.errors.contains("is not what the package's own SHA256SUMS says"), "{}", done.errors);
    wheel(index.path(), "no-model", &[], &[("readme.txt", b"nothing")]);
    let done = place.run(&["pull", "pypi:no-model"]);
    assert!(done.errors.contains("no-model holds no model"), "{}", done.errors);
    assert_eq!(place.names().len(), 4);
}

/// What the writer makes of a folder, by the names of its files.
fn folder_files(matrix_type: u32) -> Vec<(String, Vec<u8>)> {
    let place = tempfile::tempdir().expect("a folder");
    small_folder(matrix_type, LAYOUTS[0]).write(place.path());
    let entries = fs::read_dir(place.path()).expect("a folder").map(|entry| entry.expect("an entry").path());
    let name = |path: &Path| path.file_name().expect("a name").to_string_lossy().into_owned();
    let mut files: Vec<_> = entries.map(|path| (name(&path), fs::read(&path).expect("a file"))).collect();
    files.sort();
    files
}

/// As `sha256sum * | sha256sum` says.
fn folder_sha256(files: &[(String, Vec<u8>)]) -> String {
    let lines: String = files.iter().map(|(name, bytes)| format!("{}  {name}\n", sha256(bytes))).collect();
    sha256(lines.as_bytes())
}

fn read_folder(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(path)
        .expect("a folder")
        .map(|entry| entry.expect("an entry"))
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("a file")))
        .collect();
    files.sort();
    files
}

#[test]
fn a_folder_comes_from_the_hub_file_by_file_and_goes_on_where_it_stopped() {
    let files = folder_files(2);
    let mut stored: Vec<_> = files.iter().map(|(name, bytes)| (format!("cpu/int4/{name}"), bytes.clone())).collect();
    for name in ["README.md", "cpu/README.md", "cpu/int4/.gitattributes", "cpu/int4/more/x.json"] {
        stored.push((name.to_owned(), b"nothing of ours".to_vec()));
    }
    let hub = Hub::start(Manners { files: stored, ..Manners::default() });
    let mut place = Place::new();
    place.set("HF_ENDPOINT", &hub.url);
    (hub.manners.lock().bytes_at_a_time, hub.manners.lock().is_tired) = (Some(20), true);
    let done = place.run(&["pull", "hf:owner/name"]);
    assert_eq!(done.code, Some(1));
    let pinned = format!("hf:owner/name/cpu/int4@{COMMIT}");
    assert!(done.errors.contains(&format!("of {pinned} broke off at ")), "{}", done.errors);
    assert!(place.names().is_empty());
    (hub.manners.lock().bytes_at_a_time, hub.manners.lock().is_tired) = (Some(6_000), false);
    let before = hub.downloads().len();
    let done = place.run(&["pull", "hf:owner/name/cpu/int4"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(done.answer["name"], json!("int4"));
    assert_eq!(done.answer["source"], json!(pinned));
    assert_eq!(done.answer["format"], json!("genai"));
    assert_eq!((&done.answer["architecture"], &done.answer["quantisation"]), (&json!("llama"), &json!("INT4")));
    assert_eq!(done.answer["sha256"], json!(folder_sha256(&files)));
    assert_eq!(done.answer["size_bytes"], json!(files.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()));
    assert_eq!(done.answer["fault"], Value::Null);
    assert_eq!(read_folder(&place.file("int4")), files);
    assert_eq!(place.names(), ["int4", "int4.manifest.json"]);
    // What had come of the first file was not asked for again.
    let first = hub.downloads()[before].clone();
    assert_eq!(first.from, Some(20), "{first:?}");
    // All of it is there already.
    let asked = hub.downloads().len();
    assert_eq!(place.run(&["pull", "hf:owner/name/cpu/int4/genai_config.json@v1"]).code, Some(0));
    assert_eq!(hub.downloads().len(), asked);
    // Unless it was changed since.
    fs::write(place.file("int4").join("tokenizer_config.json"), "{}").unwrap();
    let done = place.run(&["pull", "hf:owner/name"]);
    assert!(done.errors.contains("another model `int4` in the catalogue"), "{}", done.errors);
    let done = place.run(&["pull", "hf:owner/name", "--force"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(read_folder(&place.file("int4")), files);
    assert!(!place.file(".pull/work").exists());
}

#[test]
fn a_folder_of_this_machine_is_copied_listed_replaced_in_one_step_and_removed() {
    let place = Place::new();
    let source = place.folder.path().join("mine");
    small_folder(8, LAYOUTS[1]).write(&source);
    fs::create_dir(source.join("subfolder")).unwrap();
    let source_name = source.to_str().unwrap();
    let done = place.run(&["pull", source_name, "--name", "used.gguf"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(done.answer["used_by"], json!(["tzafon.sm-1"]));
    assert_eq!(place.run(&["pull", source_name]).code, Some(0));
    assert_eq!(read_folder(&place.file("mine")), {
        let place = tempfile::tempdir().unwrap();
        small_folder(8, LAYOUTS[1]).write(place.path());
        read_folder(place.path())
    });
    // The same again is no fault; another is, unless it is meant, and then a file may become a folder.
    assert_eq!(place.run(&["pull", source_name]).code, Some(0));
    small_folder(0, LAYOUTS[0]).write(&source);
    assert_eq!(place.run(&["pull", source_name]).code, Some(1));
    assert_eq!(place.run(&["pull", source_name, "--force"]).code, Some(0));
    let file = place.folder.path().join("mine.gguf");
    fs::write(&file, small_model(3).encode()).unwrap();
    for (from, format) in [(file.to_str().unwrap(), "gguf"), (source_name, "genai")] {
        let done = place.run(&["pull", from, "--name", "mine", "--force"]);
        assert_eq!((done.code, &done.answer["format"]), (Some(0), &json!(format)), "{}", done.errors);
    }
    // A folder that cannot be served never gets there.
    fs::write(source.join("model.onnx.data"), "short").unwrap();
    let done = place.run(&["pull", source_name, "--force"]);
    assert_eq!(done.code, Some(5));
    assert!(done.errors.contains("is not a model that can be served: model.onnx: initializer"), "{}", done.errors);
    assert_eq!(done.errors.trim_end().lines().count(), 1, "{}", done.errors);
    let done = place.run(&["pull", place.folder.path().to_str().unwrap()]);
    assert!(done.errors.contains("neither a file nor a folder with genai_config.json"), "{}", done.errors);

    let listed = place.run(&["list"]).answer;
    let column = |name: &str| listed.as_array().unwrap().iter().map(|row| row[name].clone()).collect::<Vec<_>>();
    assert_eq!(column("name"), ["mine", "used.gguf"]);
    assert_eq!(column("format"), ["genai", "genai"]);
    assert_eq!(column("quantisation"), ["F32", "INT8"]);
    assert_eq!(column("fault"), [Value::Null, Value::Null]);
    assert_eq!(place.run(&["rm", "used.gguf"]).code, Some(1));
    assert_eq!(place.run(&["rm", "used.gguf", "--force"]).code, Some(0));
    assert_eq!(place.run(&["rm", "mine"]).code, Some(0));
    assert!(place.names().is_empty());
    assert!(!place.file(".pull/gone").exists());
}

#[test]
fn a_folder_comes_out_of_a_package() {
    let files = folder_files(2);
    let mut place = Place::new();
    let index = tempfile::tempdir().unwrap();
    place.set("PIP_FIND_LINKS", index.path().to_str().unwrap());
    let names: Vec<_> = files.iter().map(|(name, _)| format!("data/small-int4/{name}")).collect();
    let mut members: Vec<_> = names.iter().zip(&files).map(|(name, (_, bytes))| (name.as_str(), &bytes[..])).collect();
    let sums: String = files.iter().map(|(name, bytes)| format!("{}  {name}\n", sha256(bytes))).collect();
    members.push(("SHA256SUMS", sums.as_bytes()));
    members.push(("data/README.md", b"nothing of ours"));
    wheel(index.path(), "folder-model", &[], &members);
    let done = place.run(&["pull", "pypi:folder-model"]);
    assert_eq!(done.code, Some(0), "{}", done.errors);
    assert_eq!(
        (&done.answer["name"], &done.answer["source"]),
        (&json!("small-int4"), &json!("pypi:folder-model==1.0"))
    );
    assert_eq!(done.answer["sha256"], json!(folder_sha256(&files)));
    assert_eq!(read_folder(&place.file("small-int4")), files);
    let manifest = fs::read_to_string(place.file("small-int4.manifest.json")).unwrap();
    assert!(manifest.contains("\"is_announced\": true"), "{manifest}");
}

#[test]
fn check_measures_the_served_model_and_fails_where_there_is_none() {
    let place = Place::new();
    fs::create_dir_all(place.file("")).unwrap();
    let done = place.run(&["check", "tzafon.sm-1", "--tokens", "40"]);
    assert_eq!(done.code, Some(5));
    assert!(done.errors.contains("used.gguf): cannot read model file"), "{}", done.errors);
    std::os::unix::fs::symlink(model::model_path().canonicalize().unwrap(), place.file("used.gguf")).unwrap();
    std::os::unix::fs::symlink(model::data_dir().join("lib").canonicalize().unwrap(), place.folder.path().join("lib"))
        .unwrap();
    let done = place.run(&["check", "tzafon.sm-1", "--tokens", "40"]);
    // So few tokens say little of quality, so that both verdicts are possible; both are measured.
    assert!(matches!(done.code, Some(0 | 1)), "{}", done.errors);
    assert_eq!(done.answer["positions"], json!(39), "{}", done.errors);
    let ratio = done.answer["perplexity_ratio"].as_f64().unwrap();
    assert!((0.8..1.25).contains(&ratio), "{}", done.answer);
    assert!(done.answer["kl_mean"].as_f64().unwrap() < 0.1, "{}", done.answer);
    assert_eq!(done.code == Some(1), done.errors.contains("too far from its file's weights"), "{}", done.errors);
}

#[test]
fn a_node_whose_models_do_not_fit_or_whose_cpus_are_not_there_says_so_and_does_not_start() {
    let place = Place::new();
    fs::create_dir_all(place.file("")).unwrap();
    fs::write(place.file("used.gguf"), small_model(3).encode()).unwrap();
    let config = fs::read_to_string(place.folder.path().join("config.toml")).unwrap();
    let starts = |more: &str, said: &str| {
        fs::write(place.folder.path().join("config.toml"), format!("{more}\n{config}")).unwrap();
        let done = place.lightcone(&["serve", "--listen", "127.0.0.1:0"]);
        assert_eq!(done.code, Some(5), "{}", done.errors);
        let last = done.errors.lines().last().unwrap_or_default();
        assert!(last.starts_with("lightcone: ") && last.contains(said), "{}", done.errors);
    };
    // 512 MiB of KV blocks alone are more.
    starts(
        "[node]\nmemory_max_mib = 600",
        "and 600 allowed (node.memory_max_mib): tzafon.sm-1: weights 1, KV blocks 512,",
    );
    starts("[engine]\ncpu_set = \"1023\"", "engine.cpu_set names CPU 1023, which this process may not use");
}
