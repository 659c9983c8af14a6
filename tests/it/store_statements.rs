//! Statements, re-added by other means than they were made by.

use std::collections::HashMap;

use lightcone::{
    domain::{Month, NanoUsd},
    ledger::{EntryKind, Refund, ReleaseReason, Statement, StatementError},
    store::keys,
};

use crate::support::{
    house::{House, MODEL, settlement},
    past::{date_entries, month_before},
};

const DAY_MS: u64 = 86_400_000;

fn nano(nano: i64) -> NanoUsd {
    NanoUsd::new(nano)
}

/// Whatever can happen to a tenant's money, over the last three months of which the middle one has nothing.
async fn three_months() -> (House, [Month; 3]) {
    let house = House::with_balance(1_000_000).await;
    let (ledger, tenant) = (&house.ledger, &house.tenant);
    let months = [month_before(&house, 2).await, month_before(&house, 1).await, month_before(&house, 0).await];
    let mut times = vec![months[0].begins_unix_ms()];
    let early = |offset: u64| months[0].begins_unix_ms() + offset;

    let first = house.admit(10, 10).await.unwrap();
    ledger.extend(tenant, first.request(), 5, first.hold()).await.unwrap();
    ledger.settle(&settlement(&first, 12)).await.unwrap();
    let second = house.admit(20, 10).await.unwrap();
    let mut bill = settlement(&second, 1);
    bill.usage.cached_tokens = 16;
    ledger.settle(&bill).await.unwrap();
    let request = first.request().clone();
    let refund = Refund { request, amount: nano(700), reference: "=1+1".into(), note: "\"sorry\", they said".into() };
    ledger.refund(tenant, &refund).await.unwrap();
    ledger.adjust(tenant, nano(-400), "a-1", "too much").await.unwrap();
    ledger.adjust(tenant, nano(100), "a-2", "<b>too little</b>").await.unwrap();
    let long = house.admit(30, 10).await.unwrap();
    let released = house.admit(30, 10).await.unwrap();
    ledger.release(tenant, released.request(), ReleaseReason::WorkerLost).await.unwrap();
    // On three days: the hold and its extension, then a charge on each of two, the rest in the month's last millisecond.
    times.extend([early(1), early(1), early(DAY_MS - 1), early(DAY_MS), early(DAY_MS), early(2 * DAY_MS)]);
    times.extend([months[0].ends_unix_ms() - 1; 5]);

    let this = months[2].begins_unix_ms();
    ledger.settle(&settlement(&long, 2)).await.unwrap();
    ledger.set_credit(tenant, nano(5_000), "a line").await.unwrap();
    let rest = house.balance().await.available.nano() - 1_000;
    ledger.adjust(tenant, nano(-rest), "a-3", "").await.unwrap();
    // Charged late, of which the balance covers 1,000.
    assert!(ledger.settle(&settlement(&released, 1)).await.unwrap().late);
    ledger.grant(tenant, nano(50_000), "g-2", "for next month").await.unwrap();
    let _open = house.admit(1, 1).await.unwrap();
    times.extend([this, this, this, this, this, this, this]);
    house.assert_balanced().await;
    date_entries(&house, tenant, &times).await;
    (house, months)
}

async fn statement(house: &House, month: Month) -> Statement {
    house.ledger.statement(&house.tenant, month).await.unwrap()
}

#[tokio::test]
async fn months_follow_from_each_other_and_add_up_to_the_account() {
    let (house, months) = three_months().await;
    let [first, second, third] =
        [statement(&house, months[0]).await, statement(&house, months[1]).await, statement(&house, months[2]).await];
    assert_eq!((first.opening.balance, first.opening.held), (NanoUsd::ZERO, NanoUsd::ZERO));
    assert_eq!((first.closing, second.opening, second.closing), (second.opening, second.closing, third.opening));
    let account = house.balance().await;
    assert_eq!((third.closing.balance, third.closing.held), (account.balance, account.held));
    assert_eq!([&first, &second, &third].map(|month| month.is_complete), [true, true, false]);

    let sum =
        |part: fn(&Statement) -> NanoUsd| [&first, &second, &third].iter().map(|month| part(month).nano()).sum::<i64>();
    assert_eq!(sum(|month| month.totals.granted), account.granted.nano());
    assert_eq!(sum(|month| month.totals.charged), account.charged.nano());
    assert_eq!(sum(|month| month.totals.refunded), account.refunded.nano());
    let written_off = sum(|month| month.totals.written_off);
    assert_eq!(sum(|month| month.totals.adjusted) + written_off, account.adjusted.nano());
    assert_eq!(written_off, third.write_offs[0].amount.nano());
    assert_eq!(written_off, 30 * 200 + 300 - 1_000);

    // By day and model, as the entries have it.
    let days: Vec<_> = first.charges.iter().map(|charge| (charge.day.to_string(), charge.sums)).collect();
    assert_eq!(days.len(), 2, "{days:?}");
    assert!(days[0].0.ends_with("-01") && days[1].0.ends_with("-02"), "{days:?}");
    assert_eq!((days[0].1.requests, days[0].1.prompt_tokens, days[0].1.completion_tokens), (1, 10, 12));
    assert_eq!((days[1].1.prompt_tokens, days[1].1.cached_tokens), (20, 16));
    assert!(first.charges.iter().all(|charge| charge.model.as_str() == MODEL));
    assert_eq!((second.first_entry, second.last_entry, &second.link, second.charges.len()), (None, None, &None, 0));
    assert_eq!((first.first_entry, first.last_entry, third.first_entry), (Some(1), Some(12), Some(13)));
    let last = house.ledger.last_entries(&house.tenant, 1).await.unwrap().remove(0);
    assert_eq!((third.last_entry, third.link.as_ref()), (Some(last.seq), Some(&last.link)));
    assert_eq!((third.credit_lines.len(), third.credit_lines[0].amount), (1, nano(5_000)));
    assert_eq!(first.refunds[0].note, "\"sorry\", they said");
}

#[tokio::test]
async fn a_table_read_back_adds_up_and_is_no_program() {
    let (house, months) = three_months().await;
    for month in months {
        let statement = statement(&house, month).await;
        let text = statement.to_csv();
        assert!(text.lines().count() > 3 && text.matches('\n').count() == text.matches("\r\n").count(), "{text}");
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let rows: Vec<HashMap<String, String>> = reader.deserialize().map(Result::unwrap).collect();
        let amount = |row: &HashMap<String, String>| row["amount_nano_usd"].parse::<i64>().unwrap();
        let of = |kind: &str| rows.iter().filter(|row| row["kind"] == kind).map(amount).sum::<i64>();
        let moved = rows.iter().take_while(|row| row["kind"] != "closing_balance").map(amount).sum::<i64>();
        assert_eq!(rows[0]["kind"], "opening_balance");
        assert_eq!(moved, of("closing_balance"));
        assert_eq!(of("closing_balance"), statement.closing.balance.nano());
        assert_eq!(of("held_at_end"), statement.closing.held.nano());
        assert_eq!(-of("charge"), statement.totals.charged.nano());
        assert_eq!(of("write_off") + of("adjustment"), {
            statement.totals.written_off.nano() + statement.totals.adjusted.nano()
        });
        for row in &rows {
            assert_eq!(row["amount_usd"].parse::<NanoUsd>().unwrap().nano(), amount(row));
            for cell in ["reference", "note", "model", "request"] {
                assert!(!row[cell].starts_with(['=', '+', '-', '@']), "{row:?}");
            }
        }
    }
    let text = statement(&house, months[0]).await.to_csv();
    assert!(text.contains(",'=1+1,") && text.contains("\"\"\"sorry\"\", they said\""), "{text}");
}

#[tokio::test]
async fn a_page_shows_every_amount_and_runs_nothing() {
    let (house, months) = three_months().await;
    for month in months {
        let statement = statement(&house, month).await;
        let page = statement.to_page();
        for amount in [statement.opening.balance, statement.closing.balance, statement.closing.held] {
            assert!(page.contains(&amount.to_string()), "{amount} is not in {page}");
        }
        for charge in &statement.charges {
            assert!(page.contains(&charge.sums.amount.to_string()) && page.contains(&charge.day.to_string()));
        }
        assert!(statement.link.is_none_or(|link| page.contains(&link)));
        assert!(!page.contains("<b>") && !page.contains("<script") && !page.contains("src="), "{page}");
    }
}

#[tokio::test]
async fn months_that_there_are_not_and_archived_ones_are_named() {
    let (house, months) = three_months().await;
    let (ledger, tenant) = (&house.ledger, &house.tenant);
    let before = Month::of(months[0].begins_unix_ms() - 1);
    let after = Month::of(months[2].ends_unix_ms());
    for month in [before, after] {
        let error = ledger.statement(tenant, month).await.unwrap_err();
        assert!(matches!(error, StatementError::NoSuchMonth { first, last, .. }
            if (first, last) == (months[0], months[2])));
    }
    let error = ledger.statement(&"ten_nobody".into(), months[2]).await.unwrap_err();
    assert!(matches!(error, StatementError::UnknownTenant(_)));

    let before = [statement(&house, months[0]).await, statement(&house, months[1]).await];
    let untouched = statement(&house, months[2]).await;
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(ledger.archive(folder.path(), months[2]).await.unwrap().faults, [] as [&str; 0]);
    let elsewhere = tempfile::tempdir().unwrap();
    for ledger in [ledger.clone(), ledger.clone().with_archive(elsewhere.path().to_owned())] {
        let error = ledger.statement(tenant, months[0]).await.unwrap_err();
        assert!(matches!(error, StatementError::Archived(archived) if archived == months[0]), "{error}");
        // Nothing happened in this one, as the store still knows.
        assert_eq!(ledger.statement(tenant, months[1]).await.unwrap(), before[1]);
        assert_eq!(ledger.statement(tenant, months[2]).await.unwrap(), untouched);
    }
    // Where the files are, they are what they were.
    let ledger = ledger.clone().with_archive(folder.path().to_owned());
    for (month, before) in months.iter().zip(before) {
        assert_eq!(ledger.statement(tenant, *month).await.unwrap(), before);
    }
}

/// Changes the first charge as somebody with full access to the store could. Answers its number.
async fn falsify(house: &House, field: &str, change: i64) -> u64 {
    let mut raw = house.valkey.raw().await;
    let key = keys::entries(&house.tenant);
    let mut stored: Vec<(String, Vec<(String, String)>)> =
        redis::cmd("XRANGE").arg(&key).arg("-").arg("+").query_async(&mut raw).await.unwrap();
    let is_charge = |(name, value): &(String, String)| name == "kind" && value == EntryKind::Post.as_str();
    let (id, fields) = stored.iter_mut().find(|(_, fields)| fields.iter().any(is_charge)).unwrap();
    let number = id.trim_end_matches("-0").parse().unwrap();
    let value = &mut fields.iter_mut().find(|(name, _)| name == field).unwrap().1;
    *value = (value.parse::<i64>().unwrap() + change).to_string();
    redis::cmd("DEL").arg(&key).exec_async(&mut raw).await.unwrap();
    for (id, fields) in stored {
        let mut add = redis::cmd("XADD");
        add.arg(&key).arg(id);
        for (name, value) in &fields {
            add.arg(name).arg(value);
        }
        add.exec_async(&mut raw).await.unwrap();
    }
    number
}

#[tokio::test]
async fn books_that_do_not_add_up_make_no_statement() {
    for (field, change, is_linked_anew) in [
        ("amount", 1, false),
        ("prompt", 1, false),
        ("at", 1, false),
        ("amount", 1, true),
        ("balance", 1, true),
        ("held", -1, true),
    ] {
        let (house, months) = three_months().await;
        let number = falsify(&house, field, change).await;
        if is_linked_anew {
            let entries = house.ledger.entries(&house.tenant, 0, 100).await.unwrap();
            let times: Vec<u64> = entries.iter().map(|entry| entry.unix_ms).collect();
            date_entries(&house, &house.tenant, &times).await;
        }
        let error = house.ledger.statement(&house.tenant, months[0]).await.unwrap_err();
        assert!(matches!(&error, StatementError::Unbalanced { seq, .. } if *seq == number), "{field}: {error}");
    }
}
