//! Proof of lock: who takes an image of the agent's memory and knows how keys are shielded has every key before a lock, and
//! none after it.

use std::{
    collections::HashMap,
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

use kms_protocol::{KeyRef, Opcode, Status, constraint};
use kms_tests::{
    Agent, Wire,
    canary::Canaries,
    process::{ranges, status_number, wait_until},
    programs::{needs_root, tool},
    shield::{Image, LockedRecords, PRE_KEY_LEN, Records, Recovered, hmac_states},
    wire::{NO_CONTEXT, Operations, random, use_frame},
};

/// More than are kept at hand.
const KEYS: usize = 200;

const PASSPHRASE_LEN: usize = 40;

/// An agent full of keys that the test knows.
struct Loaded {
    agent: Agent,
    wire: Wire,
    ids: Vec<[u8; 16]>,
    keys: HashMap<[u8; 16], [u8; 32]>,
    /// A message under each key, by name.
    messages: Vec<(String, Vec<u8>)>,
    /// Locked memory with no key at hand, in KiB.
    cool: u64,
    passphrase: Vec<u8>,
}

impl Loaded {
    fn start(secret_memory: &str) -> Self {
        needs_root();
        let agent = Agent::builder().config(&format!("secret_memory = \"{secret_memory}\"\n")).start();
        let mut wire = agent.connect();
        assert_eq!(wire.fact("secret-memory"), secret_memory);
        let cool = status_number(agent.pid, "VmLck");
        let (mut ids, mut keys, mut messages) = (Vec::new(), HashMap::new(), Vec::new());
        for n in 0..KEYS {
            let (name, key) = (format!("proof/{n}"), random());
            let id = wire.import(&name, &key).unwrap().id;
            ids.push(id);
            keys.insert(id, key);
            messages.push((name, Vec::new()));
        }
        let passphrase = random::<PASSPHRASE_LEN>().map(|byte| b'a' + byte % 26).to_vec();
        let mut loaded = Self { agent, wire, ids, keys, messages, cool, passphrase };
        loaded.use_keys();
        loaded
    }

    /// Every key on a message, and a few on streams of both kinds.
    fn use_keys(&mut self) {
        for (name, message) in &mut self.messages {
            *message = self.wire.encrypt(name, NO_CONTEXT, b"proof").unwrap();
            assert_eq!(self.wire.decrypt(name, NO_CONTEXT, message).unwrap(), b"proof");
        }
        for (name, _) in self.messages.iter().take(4) {
            let stream =
                self.wire.with_key(Opcode::StreamNew, KeyRef::Name(name), NO_CONTEXT, &[]).unwrap().payload;
            self.wire.with_key(Opcode::StreamOpen, KeyRef::Name(name), NO_CONTEXT, &stream[..188]).unwrap();
            self.wire.describe(KeyRef::Name(name)).unwrap();
        }
    }

    /// Waits until nothing is at hand any more, a quarter of a second after the last request.
    fn wait_until_cool(&self) {
        wait_until("the keys at hand are wiped", || status_number(self.agent.pid, "VmLck") == self.cool);
    }

    fn image(&self) -> Image {
        Image::take(self.agent.pid)
    }

    /// The keys as they were imported.
    fn raw_keys(&self) -> Canaries {
        let mut canaries = Canaries::new();
        for key in self.keys.values() {
            canaries.add_raw("a key", key);
        }
        canaries
    }

    /// What is as good as a key: the states of its HMAC.
    fn expanded_keys(&self) -> Canaries {
        let mut canaries = Canaries::new();
        for key in self.keys.values() {
            for state in hmac_states(key) {
                canaries.add_raw("an expanded key", &state);
            }
        }
        canaries
    }

    fn assert_keys_work(&mut self) {
        for (name, message) in &self.messages {
            assert_eq!(self.wire.decrypt(name, NO_CONTEXT, message).as_deref(), Ok(&b"proof"[..]));
        }
        assert_eq!(self.wire.list().unwrap().len(), KEYS);
    }
}

/// The control of every proof: before a lock the tool has all keys.
fn assert_recovered(recovered: &Recovered, loaded: &Loaded) {
    let right = loaded.keys.iter().filter(|(id, key)| recovered.keys.get(*id) == Some(*key)).count();
    assert_eq!(right, loaded.keys.len(), "keys are recovered");
}

fn assert_absent(what: &str, canaries: &Canaries, image: &Image) {
    for part in &image.parts {
        canaries.assert_absent(&format!("{what}: {:?}", part.range), &part.bytes);
    }
}

fn count(canaries: &Canaries, image: &Image) -> usize {
    image.parts.iter().map(|part| canaries.find(&part.bytes).len()).sum()
}

/// What must be so after a lock, whatever the shield lay in. `before` are the sealed records of an image from before it.
fn assert_nothing_is_left(loaded: &Loaded, before: &Records, locked_at: Instant) {
    let after = loaded.image();
    assert!(locked_at.elapsed() < Duration::from_secs(1), "the image is of the first second");
    assert_absent("raw keys after the lock", &loaded.raw_keys(), &after);
    assert_absent("expanded keys after the lock", &loaded.expanded_keys(), &after);
    let mut passphrase = Canaries::new();
    passphrase.add("the passphrase", &loaded.passphrase);
    assert_absent("the passphrase after the lock", &passphrase, &after);
    let mut names = Canaries::new();
    loaded.messages.iter().filter(|(name, _)| name.len() > 8).for_each(|(name, _)| {
        names.add_bytes("a name", name.as_bytes());
    });
    assert_absent("names after the lock", &names, &after);
    // The strongest attacker keeps the sealed records of before, and needs only what is left of the shield.
    let recovered = before.recover(&after);
    assert_eq!(
        recovered.keys.len(),
        0,
        "pre-key: {}, shield key: {}",
        recovered.by_pre_key,
        recovered.by_shield_key
    );
    let recovered = Records::find(&after, &loaded.ids).recover(&after);
    assert_eq!(recovered.keys.len(), 0);
    // What is left is sealed under a key that is not there either.
    let locked = LockedRecords::find(&after, KEYS);
    assert!(locked.found(), "the control: what the lock keeps is found");
    assert_eq!(locked.keys_in(&after), Vec::<&str>::new());
}

#[test]
fn an_image_gives_every_key_before_a_lock_and_none_after_it_under_mlock() {
    let mut loaded = Loaded::start("mlock");
    // While busy: expanded keys and the shield key are at hand, in locked memory and nowhere else.
    let hot = loaded.image();
    assert_absent("raw keys while busy", &loaded.raw_keys(), &hot);
    let expanded = loaded.expanded_keys();
    assert!(count(&expanded, &hot) > 0, "the control: an expanded key is found while it is at hand");
    for part in hot.parts.iter().filter(|part| !part.range.has("lo")) {
        expanded.assert_absent(&format!("ordinary memory while busy: {:?}", part.range), &part.bytes);
    }
    let records = Records::find(&hot, &loaded.ids);
    assert_eq!(records.len(), KEYS);
    let recovered = records.recover(&hot);
    assert!(recovered.by_shield_key, "the control: the shield key is found while it is at hand");
    assert_recovered(&recovered, &loaded);
    // Idle: only the pre-key is left, and it is enough.
    loaded.wait_until_cool();
    let idle = loaded.image();
    assert_absent("raw keys while idle", &loaded.raw_keys(), &idle);
    assert_absent("expanded keys while idle", &expanded, &idle);
    let records = Records::find(&idle, &loaded.ids);
    let recovered = records.recover(&idle);
    assert!(recovered.by_pre_key && !recovered.by_shield_key);
    assert_recovered(&recovered, &loaded);

    // Busy again, so that all that a lock has to wipe is there.
    loaded.use_keys();
    let passphrase = loaded.passphrase.clone();
    assert_eq!(loaded.wire.lock(&passphrase), Ok(true));
    let locked_at = Instant::now();
    assert_nothing_is_left(&loaded, &records, locked_at);

    assert_eq!(loaded.wire.unlock(&passphrase), Ok(true));
    loaded.assert_keys_work();
    // The control after the unlock: the same tool finds everything again, under another shield.
    let image = loaded.image();
    assert_recovered(&Records::find(&image, &loaded.ids).recover(&image), &loaded);
    assert_eq!(records.recover(&image).keys.len(), 0, "a new pre-key");
    // A second lock is as good as the first.
    assert_eq!(loaded.wire.lock(&passphrase), Ok(true));
    let locked_at = Instant::now();
    assert_nothing_is_left(&loaded, &Records::find(&image, &loaded.ids), locked_at);
    let mut wire = Wire::connect(&loaded.agent.socket);
    assert_eq!(wire.unlock(b"another passphrase"), Err(Status::Denied));
    wait_until("the back-off passes", || wire.unlock(&passphrase) == Ok(true));
    loaded.assert_keys_work();
}

/// Has the agent itself write its memory to its stderr: what root does who injects code. Gives what was written.
fn inject_write(agent: &Agent, address: u64, len: usize) -> Vec<u8> {
    let before = agent.log_bytes().len();
    let call = format!("call ((long(*)(int,void*,unsigned long))write)(2,(void*){address},{len})");
    let output = tool("gdb")
        .args(["-q", "-nx", "-batch", "-p", &agent.pid.to_string()])
        .args(["-ex", "set confirm off", "-ex", &call])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let result = said.lines().find_map(|line| line.strip_prefix("$1 = "));
    let written: i64 = result.unwrap_or_else(|| panic!("no call was injected:\n{said}")).parse().unwrap();
    let bytes = agent.log_bytes()[before..].to_vec();
    if written >= 0 {
        assert_eq!(bytes.len(), len);
    } else {
        assert_eq!(bytes.len(), 0);
    }
    bytes
}

/// Address of the pre-key in secretmem.
fn secret_region(pid: i32) -> Option<u64> {
    let region = ranges(pid)
        .into_iter()
        .find(|range| range.name.contains("secretmem") && range.permissions.starts_with("rw"));
    region.map(|range| {
        assert_eq!(range.end - range.start, PRE_KEY_LEN as u64);
        range.start
    })
}

#[test]
fn injected_code_gives_every_key_before_a_lock_and_none_after_it_under_secretmem() {
    let mut loaded = Loaded::start("secretmem");
    loaded.wait_until_cool();
    let pid = loaded.agent.pid;
    let mut image = loaded.image();
    let region = secret_region(pid).expect("a region of secretmem");
    assert!(image.unreadable.iter().any(|range| range.start == region), "root cannot read it from outside");
    let records = Records::find(&image, &loaded.ids);
    assert_eq!(records.len(), KEYS);
    assert_eq!(records.recover(&image).keys.len(), 0, "an image alone is not enough under secretmem");
    // Code inside the agent can read it: nothing is promised against that while unlocked.
    let pre_key = inject_write(&loaded.agent, region, PRE_KEY_LEN);
    image.add(region, pre_key);
    let recovered = records.recover(&image);
    assert!(recovered.by_pre_key);
    assert_recovered(&recovered, &loaded);

    loaded.use_keys();
    let passphrase = loaded.passphrase.clone();
    assert_eq!(loaded.wire.lock(&passphrase), Ok(true));
    let locked_at = Instant::now();
    assert_nothing_is_left(&loaded, &records, locked_at);
    assert_eq!(secret_region(pid), None, "the region is gone, so the machine may hibernate");
    assert_eq!(loaded.image().unreadable.len(), 0, "and there is no other place that an image does not show");
    // Injected code finds nothing at the old place; and it does run, as a readable place shows.
    assert_eq!(inject_write(&loaded.agent, region, PRE_KEY_LEN), b"");
    let readable =
        loaded.image().parts.iter().find(|part| part.range.name == "[stack]").unwrap().range.end - 64;
    assert_eq!(inject_write(&loaded.agent, readable, 64).len(), 64);

    assert_eq!(loaded.wire.fact("secret-memory"), "wiped");
    assert_eq!(loaded.wire.unlock(&passphrase), Ok(true));
    assert_eq!(loaded.wire.fact("secret-memory"), "secretmem");
    loaded.assert_keys_work();
    assert!(secret_region(pid).is_some());
}

/// Streams that the agent encrypts and decrypts hold message keys; a lock takes them too.
#[test]
fn a_lock_wipes_the_message_keys_of_remote_streams() {
    needs_root();
    let agent = Agent::start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let mut keys = Canaries::new();
    let mut others: Vec<Wire> = (0..3).map(|_| agent.connect()).collect();
    for other in &mut others {
        for _ in 0..3 {
            let (_, head) = other.remote_new("a").unwrap();
            other.remote_open("a", &head).unwrap();
            let opened =
                wire.with_key(Opcode::StreamOpen, KeyRef::Name("a"), NO_CONTEXT, &head).unwrap().payload;
            keys.add_raw("a message key", &opened[..32]);
        }
    }
    assert!(
        count(&keys, &Image::take(agent.pid)) > 0,
        "the control: AES keeps the key as the first of its round keys"
    );
    assert_eq!(wire.lock(b"passphrase"), Ok(true));
    assert_absent("message keys after the lock", &keys, &Image::take(agent.pid));
    assert_eq!(wire.unlock(b"passphrase"), Ok(true));
    for other in &mut others {
        assert_eq!(other.remote_encrypt(1, b"x"), Err(Status::NotFound));
        other.ping().unwrap();
    }
}

#[test]
fn plaintexts_and_passphrases_do_not_stay() {
    needs_root();
    let agent = Agent::builder().config("secret_memory = \"mlock\"\n").start();
    let mut wire = agent.connect();
    wire.generate("a").unwrap();
    let mut secrets = Canaries::new();
    for len in [32, 4_000, 60_000] {
        let mut plaintext = vec![0; len];
        plaintext[..32].copy_from_slice(&random::<32>());
        plaintext[len - 32..].copy_from_slice(&random::<32>());
        secrets.add_raw("the front of a plaintext", &plaintext[..32]);
        secrets.add_raw("the end of a plaintext", &plaintext[len - 32..]);
        let ciphertext = wire.encrypt("a", NO_CONTEXT, &plaintext).unwrap();
        assert_eq!(wire.decrypt("a", NO_CONTEXT, &ciphertext).unwrap(), plaintext);
        let (stream, head) = wire.remote_new("a").unwrap();
        let chunks = wire.remote_encrypt(stream, &plaintext).unwrap();
        let stream = wire.remote_open("a", &head).unwrap();
        // Where the length is that of whole chunks the agent opens nothing else.
        assert_eq!(wire.remote_decrypt(stream, 0, &chunks).unwrap(), plaintext);
        wire.remote_close(stream).unwrap();
    }
    let passphrase = random::<40>();
    secrets.add_raw("the passphrase", &passphrase);
    wire.lock(&passphrase).unwrap();
    wire.unlock(&passphrase).unwrap();
    for part in &Image::take(agent.pid).parts {
        secrets.assert_absent(&format!("{:?}", part.range), &part.bytes);
    }
    // The control: what is in the agent is found. Half a frame is held until the rest comes.
    let held = random::<64>();
    let mut control = Canaries::new();
    control.add_raw("held", &held);
    let mut half = agent.connect();
    let fields = kms_protocol::KeyAndContext { key: KeyRef::Name("a"), context: NO_CONTEXT };
    let request = kms_tests::wire::frame(Opcode::Encrypt, 9, &fields, &[&held[..], &[0; 900]].concat());
    half.send(&request[..500]).unwrap();
    wait_until("half a frame is found in locked memory", || {
        let image = Image::take(agent.pid);
        let found: Vec<_> = image.parts.iter().filter(|part| !control.find(&part.bytes).is_empty()).collect();
        assert!(found.iter().all(|part| part.range.has("lo")));
        !found.is_empty()
    });
    assert!(fs::metadata(&agent.socket).is_ok());
}

/// An image gives what is in reach, and nothing of what was removed or has expired: no sealed record stays behind.
#[test]
fn an_image_gives_no_key_that_was_removed_and_none_that_has_expired() {
    let mut loaded = Loaded::start("mlock");
    // Locked and unlocked once, so that there were records under two shields and one lock.
    let passphrase = loaded.passphrase.clone();
    loaded.wire.lock(&passphrase).unwrap();
    let locked = LockedRecords::find(&loaded.image(), KEYS);
    assert!(locked.found());
    loaded.wire.unlock(&passphrase).unwrap();
    loaded.use_keys();
    let expiring = random::<32>();
    let added = loaded.wire.add("proof/expiring", Some(&expiring), &[(constraint::LIFETIME, 1)]).unwrap();
    let image = loaded.image();
    let all = [&loaded.ids[..], &[added.id]].concat();
    let recovered = Records::find(&image, &all).recover(&image);
    assert_recovered(&recovered, &loaded);
    assert_eq!(recovered.keys.get(&added.id), Some(&expiring), "the control: it is found before its end");
    // The lock key was worked on once more, and is nowhere.
    assert_eq!(locked.keys_in(&image), Vec::<&str>::new());

    let (gone, kept) = loaded.ids.split_at(KEYS / 2);
    for (name, _) in &loaded.messages[..KEYS / 2] {
        loaded.wire.remove(name).unwrap();
    }
    wait_until("the key has expired", || loaded.agent.log().contains("a key has expired"));
    // Other requests since then, as in any agent that goes on.
    for (name, message) in &loaded.messages[KEYS / 2..] {
        assert_eq!(loaded.wire.decrypt(name, NO_CONTEXT, message).unwrap(), b"proof");
    }
    let image = loaded.image();
    // The ids of before are what the attacker knows; the records may lie wherever they lay.
    let recovered = Records::find(&image, &all).recover(&image);
    assert!(kept.iter().all(|id| recovered.keys.get(id) == loaded.keys.get(id)), "the control");
    let found = gone.iter().chain([&added.id]).filter(|id| recovered.keys.contains_key(*id)).count();
    assert_eq!(found, 0, "keys that are gone are recovered");
}

/// A36: after ten thousand operations of every kind no key is in ordinary memory in any form, nor anything that was given out.
#[test]
fn ten_thousand_operations_leave_no_key_and_no_secret_in_ordinary_memory() {
    needs_root();
    let agent = Agent::builder().config("secret_memory = \"mlock\"\n").start();
    let mut wire = agent.connect();
    let (mut keys, mut secrets) = (Canaries::new(), Canaries::new());
    let names: Vec<String> = (0..12).map(|n| format!("mixed/{n}")).collect();
    let mut expanded = Canaries::new();
    for (n, name) in names.iter().enumerate() {
        let key = random::<32>();
        let exportable = [(constraint::EXPORTABLE, 0)];
        wire.add(name, Some(&key), if n % 2 == 0 { &exportable } else { &[] }).unwrap();
        keys.add("a key", &key);
        for state in hmac_states(&key) {
            expanded.add_raw("an expanded key", &state);
        }
    }
    let first: Vec<_> = names.iter().map(|name| wire.encrypt(name, NO_CONTEXT, b"x").unwrap()).collect();
    let mut operations = 0;
    for round in 0..60 {
        for (n, name) in names.iter().enumerate() {
            let key = KeyRef::Name(name);
            let mut work = |opcode, payload: &[u8]| {
                operations += 1;
                wire.put_to_work(opcode, key, NO_CONTEXT, payload).unwrap()
            };
            let plaintext = random::<32>();
            let message = work(Opcode::Encrypt, &plaintext);
            work(Opcode::Decrypt, &message);
            let wrapped = work(Opcode::Wrap, &plaintext);
            work(Opcode::Unwrap, &wrapped);
            let stream = work(Opcode::StreamNew, &[]);
            work(Opcode::StreamOpen, &stream[..188]);
            work(Opcode::Verify, &stream[..188]);
            work(Opcode::Rewrap, &stream[..132]);
            work(Opcode::Rewrap, &message);
            work(Opcode::Verify, &wrapped);
            let tag = work(Opcode::Mac, &[7; 64]);
            work(Opcode::MacVerify, &[&tag[..], &[7; 64]].concat());
            let data_key = work(Opcode::DataKey, &[]);
            work(Opcode::Unwrap, &data_key[32..]);
            let items: Vec<_> = names
                .iter()
                .map(|name| use_frame(Opcode::DataKey, 1, KeyRef::Name(name), NO_CONTEXT, &[]))
                .collect();
            if round % 10 == 0 {
                secrets.add("a plaintext", &plaintext);
                secrets.add("a message key", &stream[188..220]);
                secrets.add("a data key", &data_key[..32]);
                for reply in wire.batch(&items).unwrap() {
                    secrets.add("a data key of a batch", &reply.payload[..32]);
                }
                operations += items.len();
            }
            if n % 2 == 0 {
                wire.export(name, 1, &[]).unwrap();
                operations += 1;
            }
            if round % 20 == 19 {
                wire.rotate(name).unwrap();
                operations += 1;
            }
        }
    }
    assert!(operations >= 10_000, "{operations}");
    for (name, message) in names.iter().zip(&first) {
        wire.decrypt(name, NO_CONTEXT, message).unwrap();
    }
    let hot = Image::take(agent.pid);
    assert!(count(&expanded, &hot) > 0, "the control: keys are at hand");
    for part in hot.parts.iter().filter(|part| !part.range.has("lo")) {
        expanded.assert_absent(&format!("ordinary memory while busy: {:?}", part.range), &part.bytes);
    }
    assert_absent("keys while busy", &keys, &hot);
    assert_absent("secrets while busy", &secrets, &hot);
    // The same where a passphrase was worked on, three times: a lock, an unlock and an export.
    let passphrase = random::<40>();
    let mut told = Canaries::new();
    told.add("the passphrase", &passphrase);
    wire.lock(&passphrase).unwrap();
    let locked = LockedRecords::find(&Image::take(agent.pid), names.len());
    assert!(locked.found());
    wire.unlock(&passphrase).unwrap();
    let (_, exported) = wire.export(&names[0], 1, &passphrase).unwrap();
    assert!(!keys.find(&exported).is_empty(), "the control: what was exported would be found");
    wire.ping().unwrap();
    let image = Image::take(agent.pid);
    assert_absent("keys after an export", &keys, &image);
    assert_absent("the passphrase after an export", &told, &image);
    assert_eq!(
        locked.keys_in(&image),
        Vec::<&str>::new(),
        "neither the lock key nor the key of the passphrase"
    );
    // And a second lock is not undone by what the first one left.
    wire.lock(&passphrase).unwrap();
    let image = Image::take(agent.pid);
    assert_eq!(locked.keys_in(&image), Vec::<&str>::new());
    assert_absent("keys after the second lock", &keys, &image);
    assert_absent("expanded keys after the second lock", &expanded, &image);
}
