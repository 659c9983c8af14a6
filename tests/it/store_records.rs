//! Idempotency keys in the store: whoever was away for too long changes nothing of the next one's.

use std::time::Duration;

use lightcone::{
    domain::{NodeId, RequestId},
    records::{Answered, Key, Once, Records, Retention},
};

use crate::support::house::House;

fn answer(text: &str) -> Answered {
    Answered { content_type: "application/json".into(), ignored: vec![], limited_by: None, body: text.into() }
}

#[tokio::test]
async fn only_its_asker_renews_answers_and_frees_a_key() {
    let house = House::with_balance(1).await;
    let records = Records::new(house.store.clone(), Retention::default(), Duration::from_millis(80));
    let key = |body: &str| {
        let (request, node) = (RequestId::generate(), NodeId::generate());
        Key::new(house.tenant.clone(), "k", "/chat/completions", body.as_bytes(), &request, &node)
    };
    let (late, same, other) = (key("a"), key("a"), key("b"));
    assert_eq!(records.begin(&late).await.unwrap(), Once::First(None));
    // Asked again by itself, because the answer to it was lost.
    assert_eq!(records.begin(&late).await.unwrap(), Once::First(None));
    assert_eq!(records.begin(&same).await.unwrap(), Once::Again);
    assert_eq!(records.begin(&other).await.unwrap(), Once::Other);
    // What is renewed stays; what is not lapses, and another may ask.
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(records.renew(&late).await.unwrap());
    }
    assert_eq!(records.begin(&same).await.unwrap(), Once::Again);
    tokio::time::sleep(Duration::from_millis(120)).await;
    // And is told of whom nobody will ever have the answer.
    assert!(matches!(records.begin(&other).await.unwrap(), Once::First(Some(_))));
    assert!(!records.renew(&late).await.unwrap());
    assert!(!records.answered(&late, &answer("late")).await.unwrap());
    records.forget(&late).await.unwrap();
    assert!(records.is_asked(&other).await.unwrap(), "freed by one whose it was not");
    assert_eq!(records.answer(&other).await.unwrap(), None);
    assert!(records.answered(&other, &answer("its own")).await.unwrap());
    assert_eq!(records.answer(&other).await.unwrap(), Some(answer("its own")));
    // The answer and its question live on, beyond the lease.
    tokio::time::sleep(Duration::from_millis(120)).await;
    assert_eq!(records.begin(&late).await.unwrap(), Once::Other);
    records.forget(&other).await.unwrap();
    assert!(matches!(records.begin(&late).await.unwrap(), Once::First(Some(_))));
    assert_eq!(records.answer(&late).await.unwrap(), None);
}
