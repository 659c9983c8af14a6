//! The command line, as scripts and people use it: the program itself on a real Redis.

use serde_json::{Value, json};

use crate::support::process::{Home, Redis};

/// A command line and its store.
struct Desk {
    home: Home,
    redis: Redis,
}

const TIER: &str = "[tiers.gold]\nrequests_per_minute = 7\nspend_usd_per_day = \"12.50\"\n";

impl Desk {
    fn new() -> Self {
        Self { home: Home::new(TIER), redis: Redis::start() }
    }

    fn all<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        [arguments, &["--redis-url", &self.redis.url]].concat()
    }

    fn run(&self, arguments: &[&str]) -> Value {
        self.home.run(&self.all(arguments))
    }

    fn table(&self, arguments: &[&str]) -> String {
        self.home.table(&self.all(arguments))
    }

    /// What a command that is used wrongly says, which is one line.
    fn refused(&self, arguments: &[&str]) -> String {
        let (code, said) = self.home.refused(&self.all(arguments));
        assert_eq!((code, said.lines().count()), (2, 1), "{arguments:?}: {said}");
        said.strip_prefix("lightcone: ").expect("our name").trim_end().to_owned()
    }

    /// A tenant with ten dollars.
    fn tenant(&self) -> String {
        text(&self.run(&["tenants", "create", "Acme", "--balance", "10"])["id"])
    }

    /// Actions and targets of the record, the oldest first; whoever did it was somebody of this machine.
    fn audit(&self) -> Vec<(String, String)> {
        let records = self.run(&["audit", "list"]);
        let record = |record: &Value| {
            assert!(text(&record["actor"]).starts_with("cli "), "{record}");
            assert!(record["unix_ms"].as_u64().is_some_and(|ms| ms > 1_700_000_000_000), "{record}");
            (text(&record["action"]), text(&record["target"]))
        };
        records.as_array().expect("records").iter().rev().map(record).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

#[test]
fn the_words_that_scripts_rely_on_do_what_they_say() {
    let desk = Desk::new();
    let tenant = desk.run(&["tenants", "create", "Acme", "--balance", "12.5"]);
    let id = text(&tenant["id"]);
    assert_eq!((&tenant["name"], &tenant["status"], &tenant["tier"]), (&json!("Acme"), &json!("active"), &json!("")));
    let key = desk.run(&["keys", "create", "--tenant", &id]);
    assert!(text(&key["key"]).starts_with("sk_") && text(&key["id"]).starts_with("key_"), "{key}");
    let balance = desk.run(&["balance", "--tenant", &id]);
    assert_eq!((&balance["balance_nano_usd"], &balance["held_nano_usd"]), (&json!(12_500_000_000_i64), &json!(0)));
    let report = desk.run(&["ledger", "verify"]);
    assert_eq!((&report["imbalance_nano_usd"], &report["tenants"]), (&json!(0), &json!(1)));
    assert_eq!(desk.audit(), [("tenant.create".to_owned(), id), ("key.create".to_owned(), text(&key["id"]))]);
}

#[test]
fn tenants_are_suspended_moved_to_another_tier_and_shown_as_tables_too() {
    let desk = Desk::new();
    let rich = desk.run(&["tenants", "create", "Rich", "--balance", "1", "--tier", "gold", "--credit", "0.5"]);
    assert_eq!((&rich["tier"], &rich["credit_nano_usd"]), (&json!("gold"), &json!(500_000_000)));
    assert_eq!(rich["available_nano_usd"], 1_500_000_000);
    let id = text(&rich["id"]);
    assert_eq!(desk.run(&["tenants", "suspend", &id])["status"], "suspended");
    assert_eq!(desk.run(&["tenants", "resume", &id])["status"], "active");
    assert_eq!(desk.run(&["tenants", "tier", &id, "standard"])["tier"], "");
    assert_eq!(desk.run(&["tenants", "tier", &id, "gold"])["tier"], "gold");
    assert_eq!(desk.run(&["tenants", "low-balance", &id, "0.25"])["low_balance_nano_usd"], 250_000_000);
    assert_eq!(desk.run(&["tenants", "low-balance", &id, "none"])["low_balance_nano_usd"], Value::Null);
    assert_eq!(desk.run(&["tenants", "show", &id])["id"], *id);
    assert_eq!(desk.run(&["tenants", "list"]).as_array().map(Vec::len), Some(1));
    let table = desk.table(&["tenants", "list"]);
    let rows: Vec<&str> = table.lines().collect();
    assert!(rows[0].starts_with("id ") && rows[0].contains("balance ($)"), "{table}");
    assert!(rows[1].contains("gold") && rows[1].contains("1.000000000") && rows[1].ends_with('Z'), "{table}");
    assert!(desk.refused(&["tenants", "tier", &id, "lead"]).ends_with("there are standard, gold"));
    assert_eq!(desk.audit().len(), 7, "{:?}", desk.audit());
}

#[test]
fn money_moves_once_for_each_reference_and_never_below_what_may_be_spent() {
    let desk = Desk::new();
    let id = desk.tenant();
    let credits = |arguments: &[&str]| desk.run(&[&["credits"], arguments, &["--tenant", &id]].concat());
    for repeated in [false, true] {
        let granted = credits(&["grant", "2.5", "--reference", "invoice 1"]);
        assert_eq!(
            (&granted["balance_nano_usd"], &granted["repeated"]),
            (&json!(12_500_000_000_i64), &json!(repeated))
        );
    }
    let adjusted = credits(&["adjust", "-0.000000001"]);
    assert_eq!(adjusted["balance_nano_usd"], 12_499_999_999_i64);
    assert!(text(&adjusted["reference"]).starts_with("adjust-"));
    let line = credits(&["line", "3"]);
    assert_eq!((&line["credit_nano_usd"], &line["repeated"]), (&json!(3_000_000_000_i64), &json!(false)));

    let refused = |arguments: &[&str]| desk.refused(&[&["credits"], arguments, &["--tenant", &id]].concat());
    assert_eq!(refused(&["grant", "3", "--reference", "invoice 1"]), "`invoice 1` stands for something else already");
    let poor = refused(&["adjust", "-15.5"]);
    assert_eq!(poor, "the balance of 12.499999999 does not cover -15.500000000");
    assert_eq!(refused(&["grant", "-1"]), "-1.000000000 is not an amount that can be moved so");
    assert_eq!(refused(&["line", "-1"]), "-1.000000000 is not an amount that can be moved so");
    assert!(refused(&["grant", "0.0000000001"]).starts_with("USD: `0.0000000001` is not an amount in dollars"));
    assert!(refused(&["grant", "9999999999"]).contains("does not fit 64 bits"));
    assert!(refused(&["grant", "9223372036"]).contains("does not fit 64 bits"), "with what there is");
    assert!(refused(&["refund", "1", "--request", "chatcmpl-x"]).contains("was not charged"));
    assert!(refused(&["refund", "--all", "--request", "chatcmpl-x"]).contains("was not charged"));
    let nobody = desk.refused(&["credits", "grant", "--tenant", "ten_x", "1"]);
    assert_eq!(nobody, "there is no tenant ten_x");

    assert_eq!(desk.run(&["balance", "--tenant", &id])["balance_nano_usd"], 12_499_999_999_i64);
    let kinds: Vec<String> = desk
        .run(&["ledger", "list", "--tenant", &id])
        .as_array()
        .expect("entries")
        .iter()
        .map(|entry| text(&entry["kind"]))
        .collect();
    assert_eq!(kinds, ["grant", "grant", "adjust", "credit"]);
    let later = desk.run(&["ledger", "list", "--tenant", &id, "--after", "2", "--limit", "1"]);
    assert_eq!((&later[0]["seq"], later.as_array().map(Vec::len)), (&json!(3), Some(1)));
    let movement = json!([{ "from": "balance", "to": "adjustments", "amount_nano_usd": 1 }]);
    assert_eq!(later[0]["movements"], movement);
    assert!(desk.table(&["ledger", "list", "--tenant", &id]).contains("invoice 1"));
    assert_eq!(desk.refused(&["ledger", "list", "--tenant", "ten_x"]), "there is no tenant ten_x");

    // One record for each change; what the store refused or had done before is told by a second one.
    let records = desk.run(&["audit", "list"]);
    let records = records.as_array().expect("records");
    let without = |record: &&Value| !record["detail"]["outcome"].is_null();
    let effective = |action: &str| {
        let told: Vec<&Value> = records.iter().filter(without).map(|record| &record["detail"]["record"]).collect();
        let real = |record: &&Value| record["action"] == *action && !told.contains(&&record["id"]);
        records.iter().filter(real).filter(|record| !without(record)).count()
    };
    assert_eq!((effective("credits.grant"), effective("credits.adjust"), effective("credits.line")), (1, 1, 1));
    let repeated = records.iter().rev().find(without).expect("a grant that was repeated");
    assert_eq!(repeated["detail"]["outcome"], "had been done before");
    let newest = text(&records[0]["id"]);
    assert_eq!(desk.run(&["audit", "list", "--before", &newest, "--limit", "1"])[0]["id"], records[1]["id"]);
    assert!(desk.refused(&["audit", "list", "--before", "yesterday"]).contains("expected the id of a record"));
}

#[test]
fn keys_are_made_changed_rotated_and_ended_and_their_secrets_are_never_shown_again() {
    let desk = Desk::new();
    let id = desk.tenant();
    let made = desk.run(&[
        "keys",
        "create",
        "--tenant",
        &id,
        "--label",
        "laptop",
        "--scopes",
        "chat",
        "--models",
        "tzafon.sm-1,other",
        "--expires",
        "30d",
        "--labels",
        "team=blue,stage=test",
        "--limit",
        "requests_per_minute=5",
        "--limit",
        "spend_per_day=0.5",
    ]);
    assert_eq!(made["models"], json!(["other", "tzafon.sm-1"]));
    assert_eq!(made["labels"], json!({ "stage": "test", "team": "blue" }));
    assert_eq!(made["limits"], json!({ "requests_per_minute": 5, "spend_per_day": 500_000_000 }));
    let lives = made["expires_unix_ms"].as_u64().unwrap() - made["created_unix_ms"].as_u64().unwrap();
    assert!((lives / 1000).abs_diff(30 * 86_400) < 60, "{lives}");
    let key = text(&made["id"]);

    let changed = desk.run(&[
        "keys",
        "change",
        &key,
        "--label",
        "desk",
        "--models",
        "all",
        "--expires",
        "never",
        "--labels",
        "",
        "--limit",
        "requests_per_minute=none",
        "--limit",
        "requests_at_once=2",
    ]);
    let but = |name: &str| changed[name].clone();
    assert_eq!((but("label"), but("models"), but("expires_unix_ms")), (json!("desk"), Value::Null, Value::Null));
    assert_eq!((but("labels"), but("scopes")), (json!({}), json!(["chat"])));
    assert_eq!(but("limits"), json!({ "requests_at_once": 2, "spend_per_day": 500_000_000 }));
    let until = desk.run(&["keys", "change", &key, "--expires", "2199-12-31T23:59:59+01:00"]);
    assert_eq!(until["expires_unix_ms"], 7_258_114_799_000_u64);

    let rotated = desk.run(&["keys", "rotate", &key, "--grace", "1h"]);
    assert_eq!((&rotated["id"], &rotated["label"]), (&json!(key), &json!("desk")));
    let secrets = [text(&made["key"]), text(&rotated["key"])];
    assert_ne!(secrets[0], secrets[1]);
    assert_eq!(rotated["prefix"], secrets[1][..11]);
    let revoked = desk.run(&["keys", "revoke", &key]);
    assert_eq!((&revoked["id"], &revoked["status"]), (&json!(key), &json!("revoked")));
    assert_eq!(desk.run(&["keys", "revoke", &key]), revoked, "once is enough");
    assert!(desk.refused(&["keys", "rotate", &key]).contains("is revoked"));
    assert!(desk.refused(&["keys", "change", &key, "--label", "x"]).contains("is revoked"));

    let listed = desk.run(&["keys", "list", "--tenant", &id]);
    assert_eq!((listed.as_array().map(Vec::len), &listed[0]), (Some(1), &revoked));
    let audit = desk.run(&["audit", "list"]);
    let everything = format!("{listed}{audit}{}{}", desk.run(&["keys", "show", &key]), desk.table(&["keys", "list"]));
    for secret in &secrets {
        assert!(!everything.contains(&secret[11..]), "{everything}");
    }
    let changes: Vec<String> =
        desk.audit().into_iter().filter(|(_, target)| *target == key).map(|(what, _)| what).collect();
    assert_eq!(changes, ["key.create", "key.change", "key.change", "key.rotate", "key.revoke"]);
}

#[test]
fn limits_and_prices_are_set_and_shown_with_where_they_come_from() {
    let desk = Desk::new();
    let id = desk.tenant();
    desk.run(&["tenants", "tier", &id, "gold"]);
    let set = desk.run(&["limits", "set", "--tenant", &id, "requests_per_minute=3", "spend_per_month=9000000"]);
    assert_eq!(set["limits"], json!({ "requests_per_minute": 3, "spend_per_month": 9_000_000_000_000_000_u64 }));
    let key = text(&desk.run(&["keys", "create", "--tenant", &id])["id"]);
    desk.run(&["limits", "set", "--key", &key, "requests_at_once=1"]);
    let shown = desk.run(&["limits", "show", "--tenant", &id, "--key", &key]);
    let row = |name: &str| shown.as_array().unwrap().iter().find(|row| row["limit"] == *name).unwrap().clone();
    let rate = json!({ "limit": "requests_per_minute", "tier": 7, "own": 3, "tenant": 3, "key": null });
    assert_eq!(row("requests_per_minute"), rate);
    let spend = json!({ "limit": "spend_per_day", "tier": 12_500_000_000_u64, "own": null,
        "tenant": 12_500_000_000_u64, "key": null });
    assert_eq!((row("spend_per_day"), &row("requests_at_once")["key"]), (spend, &json!(1)));
    assert!(desk.table(&["limits", "show", "--tenant", &id]).contains("$12.500000000"));
    let gone = desk.run(&["limits", "set", "--tenant", &id, "requests_per_minute=none", "spend_per_month=none"]);
    assert_eq!(gone["limits"], json!({}));
    let dear = desk.refused(&["limits", "set", "--tenant", &id, "spend_per_day=9000000.000000001"]);
    assert!(dear.contains("dollars from 0 to 9000000"), "{dear}");

    let price = "tzafon.sm-1=0.40/0.60/0.10";
    let list = desk.run(&["prices", "set", "--version", "2027-01", "--price", price]);
    assert_eq!(list["prices"]["tzafon.sm-1"], json!({ "input": 400, "output": 600, "cached_input": 100 }));
    let later = ["--from", "2199-01-01T00:00:00Z", "--free", "tzafon.sm-1", "--price", "tzafon.sm-1=0/0"];
    desk.run(&[&["prices", "set", "--version", "gift"], later.as_slice()].concat());
    // When everybody has heard of it.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let rows = desk.run(&["prices", "list"]);
    let rows: Vec<(String, bool)> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (text(&row["version"]), row["in_force"].as_bool().unwrap()))
        .collect();
    assert_eq!(rows.iter().map(|(_, is)| *is).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!((&*rows[1].0, &*rows[2].0), ("2027-01", "gift"));
    let refused =
        |version: &str, more: &[&str]| desk.refused(&[&["prices", "set", "--version", version], more].concat());
    assert!(refused("2027-01", &["--price", price]).contains("exists already"));
    assert!(refused("x", &["--price", price, "--from", "2020-01-01T00:00:00Z"]).contains("in the past"));
    assert!(refused("x", &["--price", "tzafon.sm-1=0/0.6"]).contains("gives the model away"));
    assert!(refused("x", &["--price", "tzafon.sm-1=0.2/0.3/0.4"]).contains("cannot cost more"));
    assert!(refused("x", &["--price", "tzafon.sm-1=0.0001/0.3"]).contains("steps of 0.001"));
    assert!(refused("x", &["--price", "gpt-9=1/2"]).contains("no model `gpt-9`; there are tzafon.sm-1"));
    assert!(refused("a b", &["--price", price]).contains("price version must have"));
    let actions: Vec<String> = desk.audit().into_iter().map(|(action, _)| action).collect();
    let prices: Vec<&String> = actions.iter().filter(|action| action.starts_with("prices")).collect();
    assert_eq!(prices, ["prices.set", "prices.set"], "{actions:?}");
}

#[test]
fn what_is_written_wrongly_is_named_in_one_line_and_changes_nothing() {
    let desk = Desk::new();
    let id = desk.tenant();
    let before = desk.audit();
    for (arguments, named) in [
        (vec!["tenants", "create", "X", "--balance", "1.0000000001"], "--balance: `1.0000000001`"),
        (vec!["tenants", "create", "X", "--balance", "-1"], "an opening balance cannot be -1.000000000"),
        (vec!["tenants", "create", "X", "--credit", "-1"], "a credit line cannot be negative"),
        (vec!["tenants", "create", " "], "a name must have"),
        (vec!["tenants", "create", "X", "--tier", "lead"], "no tier `lead`"),
        (vec!["tenants", "show", "ten_x"], "there is no tenant ten_x"),
        (vec!["tenants", "suspend", "ten_x"], "there is no tenant ten_x"),
        (vec!["tenants", "low-balance", &id, "-1"], "cannot be negative"),
        (vec!["keys", "create", "--tenant", "ten_x"], "there is no tenant ten_x"),
        (vec!["keys", "create", "--tenant", &id, "--scopes", "root"], "--scopes: `root` is no scope"),
        (vec!["keys", "create", "--tenant", &id, "--scopes", ""], "at least one scope"),
        (vec!["keys", "create", "--tenant", &id, "--models", ""], "a list of models"),
        (vec!["keys", "create", "--tenant", &id, "--expires", "soon"], "--expires: `soon` is neither a time"),
        (vec!["keys", "create", "--tenant", &id, "--expires", "2020-01-01T00:00:00Z"], "cannot expire at"),
        (vec!["keys", "create", "--tenant", &id, "--labels", "team"], "--labels: `team` is not of the form"),
        (vec!["keys", "create", "--tenant", &id, "--limit", "joy=1"], "--limit: `joy` is no limit"),
        (vec!["keys", "create", "--tenant", &id, "--limit", "tokens_per_day=-1"], "not a whole number from 0"),
        (vec!["keys", "show", "key_x"], "there is no key key_x"),
        (vec!["keys", "rotate", "key_x", "--grace", "long"], "--grace: `long` is no time"),
        (vec!["keys", "rotate", "key_x", "--grace", "31d"], "for 30 days at most"),
        (vec!["limits", "set", "--tenant", &id, "spend_per_day"], "not of the form NAME=VALUE"),
        (vec!["limits", "show", "--tenant", "ten_x"], "there is no tenant ten_x"),
        (vec!["balance", "--tenant", "ten_x"], "there is no tenant ten_x"),
    ] {
        let said = desk.refused(&arguments);
        assert!(said.contains(named), "{arguments:?}: {said}");
    }
    assert_eq!(desk.audit(), before);
    // What is no command at all is for the reader of arguments, which says more.
    for arguments in [vec!["tenants", "sell"], vec!["limits", "set", "a=1"], vec!["credits", "refund", "--tenant", &id]]
    {
        assert_eq!(desk.home.refused(&desk.all(&arguments)).0, 2, "{arguments:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_charge_is_given_back_once_in_parts_or_all_that_is_left() {
    let desk = Desk::new();
    desk.run(&["keys", "bootstrap"]);
    let node = desk.home.start(&["--redis-url", &desk.redis.url]);
    let told = node.ask(&desk.home.key(), "hello", 10).await.rest().await;
    assert!(told.done, "{told:?}");
    desk.home.assert_settled(&["--redis-url", &desk.redis.url]);
    let post = desk.home.posts(&["--redis-url", &desk.redis.url])[0].clone();
    let (request, charged) = (text(&post["request"]), post["amount_nano_usd"].as_i64().unwrap());
    let refund = |more: &[&str]| {
        desk.run(&[&["credits", "refund", "--tenant", "ten_development", "--request", &request], more].concat())
    };
    assert_eq!(refund(&["0.000000100", "--reference", "r1"])["amount_nano_usd"], 100);
    for repeated in [false, true] {
        let rest = refund(&["--all", "--reference", "r2"]);
        assert_eq!((&rest["amount_nano_usd"], &rest["repeated"]), (&json!(charged - 100), &json!(repeated)));
    }
    let no_more = ["credits", "refund", "--tenant", "ten_development", "--request", &request, "0.000000001"];
    assert!(desk.refused(&no_more).contains("only 0.000000000 is left"));
    let of_request = desk.run(&["ledger", "list", "--tenant", "ten_development", "--request", &request]);
    let kinds: Vec<&str> = of_request.as_array().unwrap().iter().map(|entry| entry["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["hold", "post", "refund", "refund"]);
    let money = desk.home.assert_settled(&["--redis-url", &desk.redis.url]);
    assert_eq!(money["refunded_nano_usd"], charged);
    assert_eq!(desk.run(&["audit", "list"]).as_array().unwrap().last().unwrap()["action"], "bootstrap");
}

#[test]
fn a_tenant_that_was_half_made_when_its_maker_died_is_listed_before_it_has_money() {
    for (point, listed) in [("operator.tenant.opened", 0), ("operator.tenant.listed", 1)] {
        let desk = Desk::new();
        let ended = desk.home.armed(&desk.all(&["tenants", "create", "Half", "--balance", "10"]), point);
        assert!(!ended.success(), "{point}");
        let tenants = desk.run(&["tenants", "list"]);
        assert_eq!(tenants.as_array().map(Vec::len), Some(listed), "{point}: {tenants}");
        let tenant = text(&desk.run(&["audit", "list"])[0]["target"]);
        if listed == 1 {
            assert_eq!(desk.run(&["balance", "--tenant", &tenant])["balance_nano_usd"], 0);
        } else {
            assert!(desk.refused(&["keys", "create", "--tenant", &tenant]).contains("no tenant"));
            assert!(desk.refused(&["credits", "grant", "--tenant", &tenant, "1"]).contains("no tenant"));
        }
        assert_eq!(desk.run(&["ledger", "verify"])["faults_total"], 0);
    }
}
