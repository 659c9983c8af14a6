//! Who pays: one test for each row of the table in `docs/BILLING.md`.

use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::support::process::{Home, Node, Redis, Told};

const INPUT: u64 = 200;
const OUTPUT: u64 = 300;

struct Shop {
    home: Home,
    node: Node,
    key: String,
    http: reqwest::Client,
}

impl Shop {
    fn open() -> Self {
        Self::with("", "")
    }

    fn with(ledger: &str, extra: &str) -> Self {
        Self::at_home(Home::with_leases(2000, ledger, extra))
    }

    /// With further lines of the edge's section.
    fn with_edge(edge: &str, extra: &str) -> Self {
        let home = Home::with_leases(2000, "", extra);
        home.configure("[edge]\n", &format!("[edge]\n{edge}"));
        Self::at_home(home)
    }

    fn at_home(home: Home) -> Self {
        let node = home.start(&[]);
        let key = home.key();
        Self { home, node, key, http: reqwest::Client::new() }
    }

    fn request(&self, body: &Value) -> reqwest::RequestBuilder {
        let request = self.http.post(format!("{}/v1/chat/completions", self.node.url)).bearer_auth(&self.key);
        request.header("content-type", "application/json").body(body.to_string())
    }

    async fn whole(&self, body: &Value) -> Value {
        let answer = self.request(body).send().await.expect("an answer");
        serde_json::from_str(&answer.text().await.expect("a body")).expect("JSON")
    }

    /// The only charge, once nothing is on hold any more.
    fn only_post(&self) -> Value {
        self.home.assert_settled(&[]);
        let mut posts = self.home.posts(&[]);
        assert_eq!(posts.len(), 1, "{posts:#?}");
        posts.remove(0)
    }

    fn assert_free(&self) {
        assert_eq!(self.home.assert_settled(&[])["charged_nano_usd"], 0);
        assert_eq!(self.home.posts(&[]), [] as [Value; 0]);
    }
}

fn ask(text: &str, tokens: u32) -> Value {
    json!({ "messages": [{ "role": "user", "content": text }], "max_tokens": tokens, "ignore_eos": true, "temperature": 0 })
}

fn cost(usage: &Value) -> u64 {
    let count = |name: &str| usage[name].as_u64().expect("a number");
    count("prompt_tokens") * INPUT + count("completion_tokens") * OUTPUT
}

fn assert_charged(post: &Value, usage: &Value, note: &str) {
    assert_eq!(post["usage"]["prompt_tokens"], usage["prompt_tokens"], "{post}");
    assert_eq!(post["usage"]["completion_tokens"], usage["completion_tokens"], "{post}");
    assert_eq!((&post["amount_nano_usd"], &post["note"]), (&json!(cost(usage)), &json!(note)), "{post}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completed_pays_prompt_and_answer() {
    let shop = Shop::open();
    let answer = shop.whole(&ask("well", 20)).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_charged(&shop.only_post(), &answer["usage"], "length");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_pays_the_tokens_until_the_stop() {
    let shop = Shop::open();
    let mut body = ask("one two three four five", 100);
    body["stop"] = json!("three");
    let answer = shop.whole(&body).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["usage"]["completion_tokens"].as_u64().expect("a number") < 100);
    assert_charged(&shop.only_post(), &answer["usage"], "stop");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disconnected_pays_what_was_decoded_until_it_took_effect() {
    let shop = Shop::open();
    let mut answer = shop.node.ask(&shop.key, "slowly <<slow:10>>", 400).await;
    answer.begun().await;
    drop(answer);
    let post = shop.only_post();
    assert_eq!(post["note"], "cancelled");
    assert_eq!(post["amount_nano_usd"], json!(cost(&post["usage"])));
    let decoded = post["usage"]["completion_tokens"].as_u64().expect("a number");
    assert!((1..400).contains(&decoded), "{decoded}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cancelled_pays_what_its_last_event_says() {
    let shop = Shop::open();
    let mut answer = shop.node.ask(&shop.key, "slowly <<slow:10>>", 400).await;
    let first: Value = serde_json::from_str(&answer.next().await.expect("an event")).expect("JSON");
    answer.begun().await;
    let id = first["id"].as_str().expect("an id");
    let cancel = shop.http.post(format!("{}/v1/chat/completions/{id}/cancel", shop.node.url)).bearer_auth(&shop.key);
    assert_eq!(cancel.send().await.expect("an answer").status(), StatusCode::OK);
    let told = answer.rest().await;
    assert!(told.done, "{told:?}");
    assert_charged(&shop.only_post(), told.usage.as_ref().expect("usage"), "cancelled");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_died_is_paid_once_for_what_it_had_decoded() {
    let Shop { home, node, key, .. } = Shop::open();
    let mut answer = node.ask(&key, "slowly <<slow:10>>", 400).await;
    answer.begun().await;
    node.kill();
    let delivered = answer.rest().await.chunks + 1;
    for _ in 0..2 {
        let _node = home.start(&[]);
        home.assert_settled(&[]);
        let posts = home.posts(&[]);
        assert_eq!(posts.len(), 1, "{posts:#?}");
        assert_eq!(
            (&posts[0]["note"], &posts[0]["amount_nano_usd"]),
            (&json!("worker_lost"), &json!(cost(&posts[0]["usage"])))
        );
        assert!(posts[0]["usage"]["completion_tokens"].as_u64().expect("a number") >= delivered);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failed_by_us_is_free() {
    let shop = Shop::open();
    let told = shop.node.ask(&shop.key, "now <<fail:5>>", 50).await.rest().await;
    assert!(told.chunks > 0 && told.error.expect("an error").to_string().contains("Nothing was charged"));
    shop.assert_free();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_produced_is_free() {
    let (home, redis) = (Home::new(""), Redis::start());
    let at = ["--redis-url", &redis.url];
    home.run(&["keys", "bootstrap", at[0], at[1]]);
    // There is no worker, and its client does not wait for one.
    let node = home.start(&["--role", "edge", at[0], at[1]]);
    let request = reqwest::Client::new().post(format!("{}/v1/chat/completions", node.url)).bearer_auth(home.key());
    let request = request.header("content-type", "application/json").body(ask("well", 10).to_string());
    assert!(request.timeout(std::time::Duration::from_millis(300)).send().await.is_err());
    assert_eq!(home.assert_settled(&at)["charged_nano_usd"], 0);
    let entries = home.run(&["ledger", "list", "--tenant", "ten_development", at[0], at[1]]);
    let last = entries.as_array().and_then(|entries| entries.last()).expect("entries");
    assert_eq!((&last["kind"], &last["note"]), (&json!("release"), &json!("withdrawn")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_is_free() {
    let shop = Shop::open();
    let refusals = [
        (json!({ "messages": [] }), 400),
        (json!({ "model": "none", "messages": [{ "role": "user", "content": "x" }] }), 404),
        (ask(&"word ".repeat(3000), 10), 400),
    ];
    for (body, status) in refusals {
        let answer = shop.request(&body).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status);
    }
    shop.assert_free();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asked_again_with_the_same_key_pays_once() {
    let shop = Shop::open();
    let mut answers = Vec::new();
    for _ in 0..3 {
        let request = shop.request(&ask("well", 20)).header("idempotency-key", "only once");
        answers.push(request.send().await.expect("an answer").text().await.expect("a body"));
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    let answer: Value = serde_json::from_str(&answers[0]).expect("JSON");
    assert_charged(&shop.only_post(), &answer["usage"], "length");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_choices_pay_the_prompt_once() {
    let shop = Shop::open();
    let mut body = ask("well", 10);
    body["n"] = json!(3);
    let answer = shop.whole(&body).await;
    assert_eq!(answer["usage"]["completion_tokens"], 30);
    assert_charged(&shop.only_post(), &answer["usage"], "length");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cached_prompt_tokens_pay_their_own_price_where_there_is_one() {
    let model = "engine = \"scripted\"\ncontext_tokens_max = 1024\noutput_tokens_max = 512\nsequences_max = 4\n\
                 kv_memory_mib = 1024\ncached_input_usd_per_million = \"0.05\"\n";
    let home = Home::of_model(model, "");
    let node = home.start(&[]);
    let key = home.key();
    let mut due = 0;
    for round in 0..2 {
        let usage = node.ask(&key, &"the same words again ".repeat(20), 4).await.rest().await.usage.expect("usage");
        let prompt = usage["prompt_tokens"].as_u64().expect("a number");
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number");
        assert_eq!(cached > 0, round > 0);
        due += (prompt - cached) * INPUT + cached * 50 + 4 * OUTPUT;
    }
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], due);
}

/// A tenant with so much, and its key.
fn tenant(home: &Home, nano: u64) -> (String, String) {
    let usd = format!("{}.{:09}", nano / 1_000_000_000, nano % 1_000_000_000);
    let made = home.run(&["tenants", "create", "poor", "--balance", &usd]);
    let id = made["id"].as_str().expect("an id").to_owned();
    let key = home.run(&["keys", "create", "--tenant", &id])["key"].as_str().expect("a key").to_owned();
    (id, key)
}

async fn asked(shop: &Shop, key: &str, tokens: u32) -> Told {
    shop.node.ask(key, "well", tokens).await.rest().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_ends_with_the_last_token_that_the_balance_pays_for() {
    let shop = Shop::with("step_tokens = 8\n", "");
    let usage = asked(&shop, &shop.key, 1).await.usage.expect("usage");
    let prompt = usage["prompt_tokens"].as_u64().expect("a number");
    // Exactly 21 tokens, and then almost a 22nd; neither is a multiple of a step.
    for rest in [0, OUTPUT - 1] {
        let (id, key) = tenant(&shop.home, prompt * INPUT + 21 * OUTPUT + rest);
        let told = asked(&shop, &key, 500).await;
        assert_eq!((told.finish.as_deref(), told.stop_reason.as_deref()), (Some("length"), Some("balance_exhausted")));
        assert_eq!(told.usage.expect("usage")["completion_tokens"], 21);
        let money = shop.home.run(&["balance", "--tenant", &id]);
        assert_eq!((&money["balance_nano_usd"], &money["held_nano_usd"]), (&json!(rest), &json!(0)));
        // Nothing is left for a prompt.
        let told = asked(&shop, &key, 1).await;
        assert_eq!(told.error.expect("an error")["code"], "insufficient_quota");
        let note = shop.home.run(&["ledger", "list", "--tenant", &id, "--limit", "1"])[0]["note"].clone();
        assert_eq!(note, "balance_exhausted");
    }
    shop.home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_balance_is_not_blocked_by_a_large_limit_of_tokens() {
    let shop = Shop::with("step_tokens = 16\n", "");
    let usage = asked(&shop, &shop.key, 1).await.usage.expect("usage");
    let prompt = usage["prompt_tokens"].as_u64().expect("a number");
    let (id, key) = tenant(&shop.home, 2 * (prompt * INPUT + 16 * OUTPUT));
    let mut body = ask("one two three", 500);
    body["stop"] = json!("two");
    let request = shop.http.post(format!("{}/v1/chat/completions", shop.node.url)).bearer_auth(&key);
    let request = request.header("content-type", "application/json").body(body.to_string());
    let answer: Value = serde_json::from_str(&request.send().await.unwrap().text().await.unwrap()).expect("JSON");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
    let charged = shop.home.run(&["balance", "--tenant", &id])["charged_nano_usd"].clone();
    assert_eq!(charged, json!(cost(&answer["usage"])));
    shop.home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_answer_that_money_cut_short_says_so_in_a_header_and_in_its_choice() {
    let shop = Shop::with("step_tokens = 8\n", "");
    let usage = asked(&shop, &shop.key, 1).await.usage.expect("usage");
    let prompt = usage["prompt_tokens"].as_u64().expect("a number");
    let (_, key) = tenant(&shop.home, prompt * INPUT + 7 * OUTPUT);
    let mut body = ask("well", 100);
    body["n"] = json!(2);
    let request = shop.http.post(format!("{}/v1/chat/completions", shop.node.url)).bearer_auth(&key);
    let answer = request.header("content-type", "application/json").body(body.to_string()).send().await.unwrap();
    assert_eq!(answer.headers()["x-lightcone-limited-by"], "balance");
    let answer: Value = serde_json::from_str(&answer.text().await.unwrap()).expect("JSON");
    assert_eq!(answer["usage"]["completion_tokens"], 7);
    assert!(answer["choices"].as_array().unwrap().iter().all(|choice| choice["finish_reason"] == "length"));
    assert!(answer["choices"].as_array().unwrap().iter().any(|choice| choice["stop_reason"] == "balance_exhausted"));
    shop.home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_of_a_real_request_is_good_offline_and_names_the_digest_of_its_tokens() {
    use sha2::{Digest, Sha256};
    let shop = Shop::open();
    let mut body = ask("well", 20);
    body["return_token_ids"] = json!(true);
    let answer = shop.whole(&body).await;
    let id = answer["id"].as_str().expect("an id");
    let url = format!("{}/v1/generations/{id}/receipt", shop.node.url);
    let answered = shop.http.get(url).bearer_auth(&shop.key).send().await.expect("an answer");
    assert_eq!(answered.status(), StatusCode::OK);
    let text = answered.text().await.expect("a body");
    let receipt: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(receipt["amount_nano_usd"], json!(cost(&answer["usage"])));
    let mut ids = Sha256::new();
    for token in answer["choices"][0]["token_ids"].as_array().expect("token ids") {
        ids.update(u32::try_from(token.as_u64().expect("a number")).expect("an id").to_le_bytes());
    }
    assert_eq!(receipt["token_digest"], hex(&Sha256::digest(ids.finalize())));
    let file = shop.home.data_dir().join("receipt.json");
    std::fs::write(&file, &text).expect("a file");
    let verified = shop.home.run(&["receipt", "verify", file.to_str().expect("UTF-8")]);
    assert_eq!(verified["valid"], true, "{verified}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_keeps_the_price_of_its_admission_and_the_next_request_has_the_new_one() {
    let shop = Shop::with("step_tokens = 8\n", "");
    let mut stream = shop.node.ask(&shop.key, "slowly <<slow:10>>", 200).await;
    stream.begun().await;
    let configured = shop.home.run(&["prices", "list"])[0]["version"].clone();
    shop.home.run(&["prices", "set", "--version", "dearer", "--price", "tzafon.sm-1=2/3"]);
    let usage = stream.rest().await.usage.expect("usage");
    assert_charged(&shop.only_post(), &usage, "length");
    // Edges look at the price book again within a second or so.
    let mut last = Value::Null;
    for _ in 0..50 {
        let usage = asked(&shop, &shop.key, 10).await.usage.expect("usage");
        shop.home.assert_settled(&[]);
        last = shop.home.posts(&[]).pop().expect("a charge");
        match last["price_version"] == configured {
            true => assert_eq!(last["amount_nano_usd"], json!(cost(&usage))),
            false => {
                assert_eq!(last["amount_nano_usd"], json!(10 * cost(&usage)));
                break;
            }
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    assert_eq!(last["price_version"], "dearer");
    let versions: Vec<Value> = shop.home.posts(&[]).into_iter().map(|post| post["price_version"].clone()).collect();
    assert_eq!(versions[0], configured, "{versions:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_of_spend_that_is_set_during_a_stream_ends_it_at_its_last_paid_token() {
    let shop = Shop::with("step_tokens = 8\n", "");
    let (id, key) = tenant(&shop.home, 1_000_000_000);
    let mut stream = shop.node.ask(&key, "slowly <<slow:10>>", 400).await;
    stream.begun().await;
    let spent = 200 * OUTPUT + 40 * INPUT;
    let usd = format!("0.{spent:09}");
    shop.home.run(&["limits", "set", "--tenant", &id, &format!("spend_per_day={usd}")]);
    let told = stream.rest().await;
    assert_eq!((told.finish.as_deref(), told.stop_reason.as_deref()), (Some("length"), Some("spend_limit_reached")));
    let money = shop.home.run(&["balance", "--tenant", &id]);
    let charged = 1_000_000_000 - money["balance_nano_usd"].as_u64().expect("a number");
    assert!(charged <= spent && spent - charged < OUTPUT, "{charged} of {spent}");
    assert_eq!(charged, cost(&told.usage.expect("usage")));
    shop.home.assert_settled(&[]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asked_again_after_everything_died_pays_the_answer_that_it_got() {
    let mut shop = Shop::open();
    let slowly = |shop: &Shop| shop.request(&ask("slowly <<slow:10>>", 60)).header("idempotency-key", "only once");
    let first = slowly(&shop).timeout(std::time::Duration::from_millis(400)).send().await;
    assert!(first.is_err(), "it was to be killed in the middle");
    let Shop { home, node, .. } = shop;
    node.kill();
    shop.home = home;
    shop.node = shop.home.start(&[]);
    // The dead one was charged for what it had decoded, until it is known that nobody will ever have it.
    let begun = std::time::Instant::now();
    let answer = loop {
        let answer = slowly(&shop).send().await.expect("an answer");
        if answer.status() == StatusCode::OK {
            break serde_json::from_str::<Value>(&answer.text().await.expect("a body")).expect("JSON");
        }
        assert!(begun.elapsed() < crate::support::process::SOON, "{}", answer.status());
    };
    let balance = shop.home.assert_settled(&[]);
    let paid = balance["charged_nano_usd"].as_u64().zip(balance["refunded_nano_usd"].as_u64());
    assert_eq!(paid.map(|(charged, refunded)| charged - refunded), Some(cost(&answer["usage"])), "{balance}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_journal_is_lost_with_its_disk_is_paid_nothing() {
    let Shop { home, node, key, .. } = Shop::open();
    let mut answer = node.ask(&key, "slowly <<slow:10>>", 400).await;
    answer.begun().await;
    node.kill();
    std::fs::remove_dir_all(home.data_dir().join("journal")).expect("a journal");
    let _node = home.start(&[]);
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_takes_too_long_pays_what_was_decoded() {
    let shop = Shop::with_edge("request_ms_max = 1000\n", "");
    let answer = shop.request(&ask("slowly <<slow:10>>", 400)).send().await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
    let post = shop.only_post();
    assert_eq!((&post["note"], &post["amount_nano_usd"]), (&json!("cancelled"), &json!(cost(&post["usage"]))));
    let decoded = post["usage"]["completion_tokens"].as_u64().expect("a number");
    assert!((1..200).contains(&decoded), "{decoded}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn read_too_slowly_pays_what_was_decoded() {
    use tokio::io::AsyncWriteExt;
    let shop = Shop::with_edge("stream_buffer_events = 16\nchoices_max = 8\n", "");
    let mut body = ask("well", 500);
    for (name, value) in
        [("n", json!(8)), ("stream", json!(true)), ("logprobs", json!(true)), ("top_logprobs", json!(20))]
    {
        body[name] = value;
    }
    let address = shop.node.url.strip_prefix("http://").expect("an address").parse().expect("an address");
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let mut client = socket.connect(address).await.expect("a connection");
    let body = body.to_string();
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: node\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        shop.key,
        body.len()
    );
    client.write_all(request.as_bytes()).await.expect("sent");
    let begun = std::time::Instant::now();
    while shop.home.posts(&[]).is_empty() {
        assert!(begun.elapsed() < crate::support::process::SOON, "it was never cut");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let post = shop.only_post();
    assert_eq!((&post["note"], &post["amount_nano_usd"]), (&json!("cancelled"), &json!(cost(&post["usage"]))));
    let decoded = post["usage"]["completion_tokens"].as_u64().expect("a number");
    assert!((16..4000).contains(&decoded), "{decoded}");
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_no_worker_takes_in_time_is_free() {
    let (home, redis) = (Home::new(""), Redis::start());
    home.configure("wait_ms_max = 30000", "wait_ms_max = 1000");
    let at = ["--redis-url", &redis.url];
    home.run(&["keys", "bootstrap", at[0], at[1]]);
    let node = home.start(&["--role", "edge", at[0], at[1]]);
    let told = node.ask(&home.key(), "well", 10).await.rest().await;
    assert!(told.error.is_some() && told.chunks == 0, "{told:?}");
    assert_eq!(home.assert_settled(&at)["charged_nano_usd"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_drain_does_not_let_end_is_free() {
    let Shop { home, mut node, key, .. } = Shop::open();
    let mut answer = node.ask(&key, "slowly <<slow:50>>", 400).await;
    answer.begun().await;
    node.signal(nix::sys::signal::Signal::SIGTERM);
    let told = answer.rest().await;
    assert!(told.error.expect("an error").to_string().contains("Nothing was charged"));
    let begun = std::time::Instant::now();
    while node.is_running() {
        assert!(begun.elapsed() < crate::support::process::SOON, "it does not end");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let _node = home.start(&[]);
    assert_eq!(home.assert_settled(&[])["charged_nano_usd"], 0);
}
