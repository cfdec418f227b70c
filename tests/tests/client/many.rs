//! Many requests at a time against the shipped agent.

use kms_client::{AsyncClient, Batch, ContextRef, EncryptionContext, Error, Item, KeyRef, Options, Status};
use kms_tests::Agent;

use super::{client, key};

const NO: ContextRef<'_> = ContextRef::EMPTY;
const KEY: KeyRef<'_> = KeyRef::Name("data");

fn context(number: usize) -> EncryptionContext {
    EncryptionContext::from_pairs([("row", number.to_string())]).unwrap()
}

fn sealed(item: Item) -> Vec<u8> {
    match item {
        Item::Sealed(sealed) => sealed,
        _ => panic!("not sealed"),
    }
}

#[test]
fn ten_thousand_requests_are_under_way_and_each_finds_its_answer() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&key("data")).unwrap();
    let mut pipeline = client.pipeline();
    for number in 0..10_000 {
        pipeline.encrypt(KEY, context(number).as_ref(), &number.to_le_bytes());
    }
    let mut ciphertexts = vec![Vec::new(); 10_000];
    for (number, item) in pipeline {
        ciphertexts[number] = sealed(item.unwrap());
    }
    let mut pipeline = client.pipeline();
    for (number, ciphertext) in ciphertexts.iter().enumerate() {
        pipeline.decrypt(KEY, context(number).as_ref(), ciphertext);
    }
    let mut seen = 0;
    for (number, item) in pipeline {
        match item.unwrap() {
            Item::Secret(opened) => assert_eq!(opened.expose_secret(), number.to_le_bytes()),
            _ => panic!(),
        }
        seen += 1;
    }
    assert_eq!(seen, 10_000);
}

#[test]
fn the_largest_messages_both_ways_stop_nobody() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&key("data")).unwrap();
    let mut pipeline = client.pipeline();
    for _ in 0..600 {
        pipeline.encrypt(KEY, NO, &[7; 65536]);
    }
    assert_eq!(pipeline.map(|(_, item)| sealed(item.unwrap()).len()).filter(|len| *len > 65536).count(), 600);
}

#[test]
fn a_batch_of_a_thousand_with_one_bad_item_is_999_results_in_order_and_one_error() {
    let agent = Agent::start();
    let mut client = client(&agent);
    client.add(&key("data")).unwrap();
    let mut batch = Batch::new();
    for number in 0..1000_usize {
        batch.encrypt(KEY, context(number).as_ref(), &number.to_le_bytes());
    }
    let ciphertexts: Vec<_> =
        client.batch(&batch).unwrap().into_iter().map(|item| sealed(item.unwrap())).collect();
    let mut batch = Batch::new();
    for (number, ciphertext) in ciphertexts.iter().enumerate() {
        let mut ciphertext = ciphertext.clone();
        if number == 617 {
            ciphertext[100] ^= 1;
        }
        batch.decrypt(KEY, context(number).as_ref(), &ciphertext);
    }
    let results = client.batch(&batch).unwrap();
    assert_eq!(results.len(), 1000);
    for (number, item) in results.into_iter().enumerate() {
        match item {
            Ok(Item::Secret(opened)) => assert_eq!(opened.expose_secret(), number.to_le_bytes()),
            Err(Error::Refused { status: Status::InvalidCiphertext, .. }) => assert_eq!(number, 617),
            _ => panic!("{number}"),
        }
    }
    // In one frame, for the agent.
    let stats = client.stats().unwrap();
    assert!(stats.operations.iter().any(|row| row.opcode == 0x32 && row.count == 2));
}

#[test]
fn a_batch_beyond_one_frame_is_carried_out_whole() {
    let agent = Agent::builder().config("[limits]\nframe = 131072\n").start();
    let mut client = client(&agent);
    client.add(&key("data")).unwrap();
    assert_eq!(client.welcome().frame_max, 131_072);
    let mut batch = Batch::new();
    for number in 0..4500_usize {
        batch.mac(KEY, NO, &[number.to_le_bytes()[0]; 64]);
    }
    for _ in 0..20 {
        batch.encrypt(KEY, NO, &[1; 65536]);
        batch.random(65536);
        batch.data_key(KEY, NO, 1024);
    }
    let results = client.batch(&batch).unwrap();
    assert_eq!(results.len(), 4560);
    assert!(results.iter().all(Result::is_ok));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tasks_share_one_connection_to_the_agent() {
    let agent = Agent::start();
    let options = Options { socket: Some(agent.socket.clone()), ..Options::default() };
    let client = AsyncClient::connect(&options).await.unwrap();
    client.add(&key("data")).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..1000_usize {
        let client = client.clone();
        tasks.spawn(async move {
            let text = number.to_le_bytes().repeat(if number % 10 == 0 { 8000 } else { 4 });
            let sealed = client.encrypt(KEY, context(number).as_ref(), &text).await.unwrap();
            let opened = client.decrypt(KEY, context(number).as_ref(), &sealed).await.unwrap();
            assert_eq!(opened.expose_secret(), text);
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let facts = client.status().await.unwrap().facts;
    let connections = facts.iter().find(|fact| fact.name == "connections").unwrap();
    assert_eq!(connections.value, "1");
}
