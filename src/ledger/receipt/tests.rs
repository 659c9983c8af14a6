use proptest::prelude::*;
use serde_json::json;

use super::*;

fn signing_key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn key() -> ReceiptKey {
    ReceiptKey::of(&signing_key())
}

/// Every field differs from what it would be by default.
fn statement() -> ReceiptStatement {
    ReceiptStatement {
        version: RECEIPT_VERSION,
        request: "chatcmpl-01a2084343c174828840b629153c69e0".into(),
        tenant: "ten_1".into(),
        key: "key_2".into(),
        model: "tzafon.sm-1".into(),
        usage: Usage { prompt_tokens: 100, completion_tokens: 20, cached_tokens: 64 },
        price: Price { input: NanoUsd::new(200), output: NanoUsd::new(300), cached_input: NanoUsd::new(50) },
        price_version: "2026-11".into(),
        amount: NanoUsd::new(36 * 200 + 64 * 50 + 20 * 300),
        reason: "stop".into(),
        token_digest: Some("ab".repeat(32)),
        settled_unix_ms: 1_763_769_600_123,
        ledger_seq: 42,
        ledger_link: "cd".repeat(20),
    }
}

fn receipt() -> Receipt {
    Receipt::sign(statement(), &signing_key()).unwrap()
}

/// With a sound signature, whatever it states.
fn forced(statement: ReceiptStatement) -> Receipt {
    let mut receipt = receipt();
    receipt.signature.value = hex::encode(signing_key().sign(&statement.signed_bytes()).to_bytes());
    receipt.statement = statement;
    receipt
}

fn judged(text: &str) -> Result<(), ReceiptError> {
    text.parse::<Receipt>()?.verify(&key())
}

/// What any tenant has kept must stay good: this form never changes under this version's number. The signature was
/// made by another program.
#[test]
fn the_form_of_a_receipt_is_this_one() {
    let expected = concat!(
        r#"{"version":1,"request":"chatcmpl-01a2084343c174828840b629153c69e0","tenant":"ten_1","key":"key_2","#,
        r#""model":"tzafon.sm-1","usage":{"prompt_tokens":100,"completion_tokens":20,"cached_tokens":64},"#,
        r#""price":{"input":200,"output":300,"cached_input":50},"price_version":"2026-11","amount_nano_usd":16400,"#,
        r#""reason":"stop","token_digest":"abababababababababababababababababababababababababababababababab","#,
        r#""settled_unix_ms":1763769600123,"ledger_seq":42,"ledger_link":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}"#,
    );
    let signed = receipt().statement.signed_bytes();
    assert_eq!(String::from_utf8(signed).unwrap(), format!("lightcone-receipt-v1\n{expected}"));
    let signature = concat!(
        r#""signature":{"algorithm":"ed25519","key_id":"fe812c12f3ab4ce6","#,
        r#""public_key":"ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c","#,
        r#""value":"7f9dc63ac36bc59fe9415b5ad98cf052f6579c9f54b343bb9a1a9232990762a3"#,
        r#"90563b3a3328da740b4094e913571c8cb3e5fb5a4c0fb8ca81bce9b2009e2e0c"}}"#,
    );
    let text = serde_json::to_string(&receipt()).unwrap();
    assert_eq!(text, format!("{},{signature}", expected.strip_suffix('}').unwrap()));
    assert_eq!(judged(&text), Ok(()));
}

#[test]
fn texts_are_written_in_one_way() {
    let odd = ReceiptStatement { model: "a\"b\\c/é\u{2028}".into(), token_digest: None, ..statement() };
    let receipt = Receipt::sign(odd, &signing_key()).unwrap();
    let signed = String::from_utf8(receipt.statement.signed_bytes()).unwrap();
    assert!(
        signed.contains("\"model\":\"a\\\"b\\\\c/é\u{2028}\",") && signed.contains("\"token_digest\":null,"),
        "{signed}"
    );
    // Escaped otherwise, laid out otherwise, in another order: the same content, and as good.
    let text = serde_json::to_string_pretty(&receipt).unwrap().replace('é', "\\u00e9");
    assert_eq!(judged(&text), Ok(()));
    let mut fields = serde_json::to_value(&receipt).unwrap();
    let version = fields.as_object_mut().unwrap().shift_remove("version").unwrap();
    fields["version"] = version;
    assert_eq!(judged(&fields.to_string()), Ok(()));
}

#[test]
fn every_bit_of_a_receipt_counts() {
    let text = serde_json::to_string(&receipt()).unwrap();
    for (at, bit) in (0..text.len()).flat_map(|at| (0..8).map(move |bit| (at, bit))) {
        let mut bytes = text.clone().into_bytes();
        bytes[at] ^= 1 << bit;
        let Ok(changed) = String::from_utf8(bytes) else { continue };
        assert!(judged(&changed).is_err(), "bit {bit} of byte {at}: {changed}");
    }
}

#[test]
fn a_field_that_is_changed_is_found_and_none_can_be_added_left_out_or_doubled() {
    let whole = serde_json::to_value(receipt()).unwrap();
    let paths = ["", "/usage", "/price", "/signature"];
    for (path, name) in paths.iter().flat_map(|path| {
        let fields = whole.pointer(path).unwrap().as_object().unwrap();
        fields.keys().map(move |name| (*path, name.clone())).collect::<Vec<_>>()
    }) {
        let change = |value: Option<Value>| {
            let mut changed = whole.clone();
            let object = changed.pointer_mut(path).unwrap().as_object_mut().unwrap();
            match value {
                Some(value) => drop(object.insert(name.clone(), value)),
                None => drop(object.shift_remove(&name)),
            }
            changed.to_string()
        };
        let before = whole.pointer(path).unwrap()[&name].clone();
        let values = [json!(null), json!(0), json!(1), json!(7), json!(-1), json!(u64::MAX), json!(1.5), json!("x")];
        let like = match &before {
            Value::Number(number) => vec![json!(number.as_u64().unwrap() + 1), json!(number.as_f64().unwrap())],
            Value::String(text) => vec![json!(text.to_uppercase()), json!(format!("{text}0")), json!(&text[1..])],
            _ => vec![json!({})],
        };
        let others = values.into_iter().chain(like).filter(|value| *value != before);
        for text in others.map(Some).chain([None]).map(change) {
            assert!(judged(&text).is_err(), "{text}");
        }
        let twice = whole.to_string().replacen(&format!("\"{name}\":"), &format!("\"{name}\":{before},\"{name}\":"), 1);
        assert_eq!(judged(&twice).unwrap_err().code(), "malformed", "{twice}");
    }
    for path in paths {
        let mut more = whole.clone();
        more.pointer_mut(path).unwrap()["refunded"] = json!(true);
        assert_eq!(judged(&more.to_string()).unwrap_err().code(), "malformed", "{more}");
    }
}

#[test]
fn each_fault_has_its_name() {
    let other = ReceiptKey::of(&SigningKey::from_bytes(&[8; 32]));
    assert_eq!(receipt().verify(&other).unwrap_err().code(), "other_key");
    // Who puts his own key into it has still not the one that is asked for.
    let own = Receipt::sign(statement(), &SigningKey::from_bytes(&[8; 32])).unwrap();
    assert_eq!(own.verify(&other), Ok(()));
    assert_eq!(own.verify(&key()).unwrap_err().code(), "other_key");
    let passed_off =
        Receipt { signature: ReceiptSignature { value: own.signature.value, ..receipt().signature }, ..receipt() };
    assert_eq!(passed_off.verify(&key()), Err(ReceiptError::BadSignature));
    let dearer = ReceiptStatement { amount: NanoUsd::new(16_401), ..statement() };
    let wrong = ReceiptError::WrongAmount { stated: NanoUsd::new(16_401), cost: NanoUsd::new(16_400) };
    assert_eq!(forced(dearer.clone()).verify(&key()), Err(wrong.clone()));
    assert_eq!(Receipt::sign(dearer, &signing_key()), Err(wrong));
    let next = serde_json::to_string(&receipt()).unwrap().replace("\"version\":1", "\"version\":2,\"more\":1");
    assert_eq!(judged(&next), Err(ReceiptError::UnknownVersion(2)));
    for text in ["", "{}", "[]", "null", "{\"version\":1}", "{\"version\":\"1\"}"] {
        assert_eq!(judged(text).unwrap_err().code(), "malformed", "{text}");
    }
}

#[test]
fn what_is_out_of_range_is_neither_signed_nor_believed() {
    let usage = statement().usage;
    let price = statement().price;
    for (field, statement) in [
        ("request", ReceiptStatement { request: "".into(), ..statement() }),
        ("tenant", ReceiptStatement { tenant: "ten\n1".into(), ..statement() }),
        ("reason", ReceiptStatement { reason: "x".repeat(1025), ..statement() }),
        ("usage.cached_tokens", ReceiptStatement { usage: Usage { cached_tokens: 101, ..usage }, ..statement() }),
        ("price.output", ReceiptStatement { price: Price { output: NanoUsd::new(-1), ..price }, ..statement() }),
        ("amount_nano_usd", ReceiptStatement { amount: NanoUsd::new(-1), ..statement() }),
        ("token_digest", ReceiptStatement { token_digest: Some("AB".repeat(32)), ..statement() }),
        ("settled_unix_ms", ReceiptStatement { settled_unix_ms: 0, ..statement() }),
        ("ledger_seq", ReceiptStatement { ledger_seq: 0, ..statement() }),
        ("ledger_link", ReceiptStatement { ledger_link: "cd".into(), ..statement() }),
    ] {
        let fault = ReceiptError::Malformed(format!("`{field}` is out of range"));
        assert_eq!(Receipt::sign(statement.clone(), &signing_key()), Err(fault.clone()));
        assert_eq!(forced(statement).verify(&key()), Err(fault));
    }
    let price = Price { input: NanoUsd::new(i64::MAX), ..price };
    let overflow = ReceiptStatement { price, ..statement() };
    assert_eq!(forced(overflow).verify(&key()).unwrap_err().code(), "malformed");
}

proptest! {
    #[test]
    fn what_is_signed_can_be_read_and_checked(
        (prompt_tokens, cached, completion_tokens) in (0..u32::MAX, 0.0..=1.0_f64, 0..u32::MAX),
        (input, output, cached_input) in (0..1_000_000_i64, 0..1_000_000_i64, 0..1_000_000_i64),
        (settled_unix_ms, ledger_seq) in (1..u64::MAX, 1..u64::MAX),
        model in "\\PC{1,40}",
        digest in proptest::option::of("([0-9a-f]{2}){20,64}"),
    ) {
        let cached_tokens = (f64::from(prompt_tokens) * cached) as u32;
        let usage = Usage { prompt_tokens, completion_tokens, cached_tokens };
        let [input, output, cached_input] = [input, output, cached_input].map(NanoUsd::new);
        let price = Price { input, output, cached_input };
        let amount = price.cost(&usage).unwrap();
        let model = model.as_str().into();
        let stated = ReceiptStatement {
            usage, price, amount, model, settled_unix_ms, ledger_seq, token_digest: digest, ..statement()
        };
        let receipt = Receipt::sign(stated, &signing_key()).unwrap();
        let read: Receipt = serde_json::to_string(&receipt).unwrap().parse().unwrap();
        prop_assert_eq!(&read, &receipt);
        prop_assert_eq!(read.verify(&key()), Ok(()));
        let less = ReceiptStatement { amount: NanoUsd::new(amount.nano() + 1), ..receipt.statement };
        prop_assert_eq!(Receipt { statement: less, ..read }.verify(&key()), Err(ReceiptError::BadSignature));
    }
}
