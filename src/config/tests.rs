use std::io::Write;

use super::*;

fn load(text: &str) -> Result<Config, Vec<String>> {
    load_with(text, &[], Overrides::default())
}

fn load_with(text: &str, env: &[(&str, &str)], flags: Overrides) -> Result<Config, Vec<String>> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    Config::load(Some(file.path()), env, flags).map_err(|faults| {
        let name = file.path().display().to_string();
        faults.0.iter().map(|fault| fault.to_string().replace(&name, "file")).collect()
    })
}

#[test]
fn the_defaults_are_sound_and_every_rule_has_its_key_in_the_manual() {
    let config = Config::defaults();
    assert_eq!(config.models.len(), 2);
    let manual = toml_edit::Document::parse(DEFAULTS).unwrap();
    // A tier takes from `limits` what it does not state, and the manual has none.
    for (section, keys) in check::RULES.iter().filter(|(section, _)| *section != "tiers") {
        let table = &manual.as_table()[section];
        let is_of_models = *section == "models";
        let tables: Vec<_> =
            if is_of_models { table.as_table().unwrap().iter().map(|(_, item)| item).collect() } else { vec![table] };
        for table in tables {
            let stated: Vec<_> = table.as_table().unwrap().iter().map(|(key, _)| key).collect();
            let ruled = keys.iter().map(|(key, _)| *key).filter(|key| !is_of_models || *key != "enabled");
            let ruled: Vec<_> = ruled.collect();
            assert_eq!(stated, ruled, "{section}");
        }
    }
}

#[test]
fn the_documented_prices_are_exact() {
    let book = Config::defaults().price_list().unwrap();
    let price = |model: &str| book.prices[model];
    assert_eq!(price("tzafon.sm-1"), Price::flat(NanoUsd::new(200), NanoUsd::new(300)));
    assert_eq!(price("tzafon.northstar-cua-fast"), Price::flat(NanoUsd::new(300), NanoUsd::new(500)));
    assert_eq!(book.version, "2026-11");
}

/// One faulty file a row, and all that must be said about it.
#[test]
fn every_fault_is_named_with_its_line() {
    let table: &[(&str, &[&str])] = &[
        ("[node\nrole = \"all\"", &["file:1: is not TOML: "]),
        ("[edge]\nhttp_threads = 2\nhttp_threads = 3", &["file:3: is not TOML: duplicate key"]),
        ("[edge]\n\nlisten_ = \"127.0.0.1:1\"", &["file:3: edge.listen_: unknown key; did you mean `listen`?"]),
        ("[node]\ndepth_max = 3", &["file:2: node.depth_max: unknown key; did you mean queue.depth_max?"]),
        ("[egde]\nlisten = \"x\"", &["file:1: egde: unknown section; did you mean `edge`?"]),
        ("edge = 3", &["file:1: edge: is a section: write [edge]"]),
        ("[models]\nx = 3", &["file:2: models.x: is a table: write [models.\"name\"]"]),
        ("[edge]\nhttp_threads = \"2\"", &["file:2: edge.http_threads: must be a whole number, not text"]),
        ("[edge]\nhttp_threads = 0", &["file:2: edge.http_threads: 0 is out of range: must be from 1 to 256"]),
        ("[edge]\nlisten = \"localhost\"", &["file:2: edge.listen: `localhost` is not an address"]),
        (
            "[node]\nrole = \"egde\"",
            &["file:2: node.role: `egde` is not one of all, edge, worker; did you mean `edge`?"],
        ),
        ("[node]\nlog = \"lightcone=loud\"", &["file:2: node.log: `lightcone=loud` is not a log filter"]),
        ("[store]\nredis_url = \"http://x\"", &["file:2: store.redis_url: is not of the form redis://"]),
        ("[store]\nredis_url = \"rediss://x\"", &["file:2: store.redis_url: this build speaks no TLS"]),
        ("[engine]\nproviders = [\"cpu\", \"gpu\"]", &["file:2: engine.providers: `gpu` is not one of cpu, cuda"]),
        (
            "[edge]\ntrusted_proxies = [\"10.0.0.0/8\", \"::1\", \"10.0.0.0/33\"]",
            &["file:2: edge.trusted_proxies: `10.0.0.0/33` is not an address or a network such as 10.0.0.0/8"],
        ),
        (
            "[edge]\ntrusted_proxies = [7]",
            &["file:2: edge.trusted_proxies: must be text in quotes, not a whole number"],
        ),
        ("[engine]\ncpu_set = \"0-3,x\"", &["file:2: engine.cpu_set: `0-3,x` is not a set of CPUs such as 0-3,8"]),
        ("[engine]\ncpu_set = \"3-1\"", &["file:2: engine.cpu_set: `3-1` is not a set of CPUs"]),
        ("[engine]\ncpu_set = \"0-1024\"", &["file:2: engine.cpu_set: `0-1024` is not a set of CPUs"]),
        ("[node]\nmemory_max_mib = -1", &["file:2: node.memory_max_mib: -1 is out of range"]),
        ("[engine]\nproviders = []", &["file:2: engine.providers: must not be empty"]),
        (
            "[ledger]\nbootstrap_balance_usd = \"ten\"",
            &["file:2: ledger.bootstrap_balance_usd: `ten` is not an amount"],
        ),
        (
            "[models.\"tzafon.sm-1\"]\ninput_usd_per_million = \"0.2.0\"\noutput_usd_per_million = \"0.0005\"",
            &[
                "file:2: models.\"tzafon.sm-1\".input_usd_per_million: `0.2.0` is not an amount",
                "file:3: models.\"tzafon.sm-1\".output_usd_per_million: `0.0005` dollars per million tokens is not a whole",
            ],
        ),
        (
            "[models.\"tzafon.sm-1\"]\ninput_usd_per_million = 0.2",
            &[
                "file:2: models.\"tzafon.sm-1\".input_usd_per_million: must be text in quotes, not a number with a fraction",
            ],
        ),
        (
            "[models.new]\nfile = \"new.gguf\"\ninput_usd_per_million = \"-1\"",
            &[
                "file:1: models.new.output_usd_per_million: is missing",
                "file:3: models.new.input_usd_per_million: a price cannot be negative",
            ],
        ),
        (
            "[edge]\ndefault_model = \"tzafon.sm-2\"",
            &["file:2: edge.default_model: `tzafon.sm-2` is not among the models; did you mean `tzafon.sm-1`?"],
        ),
        (
            "[models.\"tzafon.sm-1\"]\noutput_tokens_max = 9000",
            &[
                "file:2: models.\"tzafon.sm-1\".output_tokens_max: 9000 must not exceed context_tokens_max, which is 8192",
            ],
        ),
        (
            "[node]\nrole = \"worker\"",
            &[
                "file:2: store.redis_url: is required for role `worker`",
                "file:2: relay.secret: is required for role `worker`",
            ],
        ),
        (
            "[node]\nrole = \"edge\"\n[store]\nredis_url = \"redis://h\"\n[relay]\nlisten = \"0.0.0.0:7\"\nsecret = \"short\"",
            &["file:6: relay.advertise: is required", "file:7: relay.secret: must have at least 16 characters"],
        ),
    ];
    for (text, expected) in table {
        let faults = load(text).expect_err(text);
        assert_eq!(faults.len(), expected.len(), "{text}\n{faults:#?}");
        for (fault, expected) in faults.iter().zip(*expected) {
            assert!(fault.starts_with(expected), "{fault}\n{expected}");
        }
    }
}

#[test]
fn all_faults_of_all_layers_are_reported_at_once() {
    let flags = Overrides { listen: Some("nowhere".into()), ..Overrides::default() };
    let faults =
        load_with("[queue]\ndepth_max = -1\n[edge]\nbody = 1", &[("LIGHTCONE_ROLE", "king")], flags).unwrap_err();
    assert_eq!(faults.len(), 4, "{faults:#?}");
    assert!(faults.iter().any(|fault| fault.starts_with("LIGHTCONE_ROLE: node.role: `king`")));
    assert!(faults.iter().any(|fault| fault.starts_with("--listen: edge.listen: `nowhere`")));
}

#[test]
fn a_file_that_cannot_be_read_is_one_clear_line() {
    let path = std::path::Path::new("/nonexistent/lightcone.toml");
    let faults = Config::load(Some(path), |_| None, Overrides::default()).unwrap_err();
    assert!(faults.to_string().starts_with("/nonexistent/lightcone.toml: cannot be read: "), "{faults}");
}

#[test]
fn flags_beat_the_environment_and_that_beats_the_file() {
    let text = "[edge]\nlisten = \"127.0.0.1:1\"\n[node]\ndata_dir = \"file\"\nlog = \"warn\"";
    let env = [("LIGHTCONE_LISTEN", "127.0.0.1:2"), ("LIGHTCONE_DATA_DIR", "env"), ("LIGHTCONE_ROLE", "")];
    let flags = Overrides { listen: Some("127.0.0.1:3".into()), ..Overrides::default() };
    let config = load_with(text, &env, flags).unwrap();
    assert_eq!(config.edge.listen.port(), 3);
    assert_eq!(config.node.data_dir, PathBuf::from("env"));
    assert_eq!(config.node.log, "warn");
    assert_eq!(config.node.role, Role::All);
}

#[test]
fn a_new_model_inherits_what_the_manual_says_and_a_known_one_can_be_switched_off() {
    let config = load(
        "[models.mine]\nfile = \"mine.gguf\"\nengine = \"scripted\"\ninput_usd_per_million = \"1\"\n\
         output_usd_per_million = \"2\"\n[models.\"tzafon.northstar-cua-fast\"]\nenabled = false\n\
         [models.\"tzafon.sm-1\"]\nsequences_max = 7",
    )
    .unwrap();
    let names: Vec<_> = config.models.keys().map(ModelId::as_str).collect();
    assert_eq!(names, ["mine", "tzafon.sm-1"]);
    let mine = &config.models["mine"];
    assert_eq!((mine.sequences_max, mine.context_tokens_max, mine.description.as_str()), (32, 8192, ""));
    assert_eq!(config.models["tzafon.sm-1"].sequences_max, 7);
}

#[test]
fn sets_of_cpus_are_numbers_and_ranges() {
    let cpus = |text: &str| load(&format!("[engine]\ncpu_set = {text:?}")).unwrap().engine.cpus();
    assert_eq!(cpus("0-2,8, 10").into_iter().collect::<Vec<_>>(), [0, 1, 2, 8, 10]);
    assert!(cpus("").is_empty());
}

#[test]
fn trusted_proxies_are_addresses_and_networks() {
    let edge = load("[edge]\ntrusted_proxies = [\"127.0.0.1\", \"10.1.0.0/16\", \"fd00::/8\"]").unwrap().edge;
    let trusted = edge.trusted_networks();
    let is_trusted =
        |ip: &str| trusted.iter().any(|network| network.contains(&ip.parse::<std::net::IpAddr>().unwrap()));
    assert!(["127.0.0.1", "10.1.2.3", "fd00::7"].into_iter().all(is_trusted));
    assert!(!["127.0.0.2", "10.2.0.1", "::1"].into_iter().any(is_trusted));
}

#[test]
fn secrets_are_not_repeated_in_faults() {
    let faults = load("[store]\nredis_url = \"http://user:hunter2@h\"\n[relay]\nsecret = \"hunter2\"").unwrap_err();
    assert!(faults.iter().all(|fault| !fault.contains("hunter2")), "{faults:#?}");
}
