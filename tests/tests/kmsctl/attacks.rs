//! Ciphertexts that somebody has been at: not one of them gives a file, and no pipe gets what was not authentic.

use std::{
    fs::{self, File},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
};

use kms_envelope::{CHUNK_LEN, HEADER_LEN, SEALED_CHUNK_LEN, STREAM_HEAD_LEN, TAG_LEN};
use kms_tests::{
    kmsctl::WAYS,
    process::{Ran, run, run_with_input},
    wire::random_bytes,
};

use super::{AT_SEVERAL_PLACES, HELD, Scene, Untouched, chunk_at, names};

const CHANGED: &str = "wrong encryption context, or truncated or changed ciphertext";

/// The head of a stream, cut where one could cut it: header, wrapped DEK, body salt and commitment.
const DEK_AT: usize = HEADER_LEN;
const BODY_AT: usize = 132;

/// `decrypt -o FILE` of a file.
fn to_file(scene: &Scene, way: &str, input: &Path, arguments: &[&str]) -> Ran {
    let mut command = scene.kmsctl(["decrypt", way, "-o"]);
    run(command.arg(scene.out().join("plain")).args(arguments).arg(input))
}

/// What must not open, in every way: neither a new file nor a changed one, nor a byte into a pipe. Gives the message.
fn is_refused_with(scene: &Scene, what: &str, ciphertext: &[u8], arguments: &[&str]) -> String {
    let input = scene.put("attacked", ciphertext);
    let mut messages = Vec::new();
    for way in WAYS {
        let message = |ran: &Ran| format!("{what}: {}", ran.refusal(1));
        messages.push(message(&to_file(scene, way, &input, arguments)));
        assert_eq!(names(&scene.out()), [""; 0], "{what}, {way}: a file is left");
        let untouched = Untouched::put(scene.out().join("plain"));
        messages.push(message(&to_file(scene, way, &input, arguments)));
        untouched.check();
        fs::remove_file(&untouched.path).unwrap();
        messages.push(message(&run(scene.kmsctl(["decrypt", way]).args(arguments).arg(&input))));
        messages.push(message(&run_with_input(scene.kmsctl(["decrypt", way]).args(arguments), ciphertext)));
    }
    messages.sort();
    messages.dedup();
    assert_eq!(messages.len(), 1, "one failure, however it is met: {messages:?}");
    messages.remove(0)
}

fn is_refused(scene: &Scene, what: &str, ciphertext: &[u8]) {
    let message = is_refused_with(scene, what, ciphertext, &["-k", "k"]);
    assert!(message.ends_with(CHANGED), "{message}");
}

/// Shows that the test itself would notice a file.
fn opens(scene: &Scene, ciphertext: &[u8], plaintext: &[u8], arguments: &[&str]) {
    let input = scene.put("sound", ciphertext);
    for way in WAYS {
        let _ = to_file(scene, way, &input, arguments).done();
        assert!(fs::read(scene.out().join("plain")).unwrap() == plaintext, "{way}");
        fs::remove_file(scene.out().join("plain")).unwrap();
    }
}

/// Two full chunks and a short one; and as many chunks as are read at several places at once.
fn lengths() -> [usize; 2] {
    [2 * CHUNK_LEN + 1000, AT_SEVERAL_PLACES + 1000]
}

#[test]
fn a_truncated_stream_gives_nothing() {
    let scene = Scene::new();
    for len in lengths() {
        let plaintext = random_bytes(len);
        let stream = scene.encrypt("--local", &plaintext, &[]);
        opens(&scene, &stream, &plaintext, &["-k", "k"]);
        let last = stream.len() / SEALED_CHUNK_LEN;
        let mut places = vec![
            HEADER_LEN,
            DEK_AT + 24,
            DEK_AT + 56,
            BODY_AT - 1,
            BODY_AT,
            BODY_AT + 24,
            STREAM_HEAD_LEN - 1,
            STREAM_HEAD_LEN,
            stream.len() - TAG_LEN - 1,
            stream.len() - TAG_LEN,
            stream.len() - 1,
        ];
        for chunk in [0, 1, last - 1, last] {
            let begin = chunk_at(chunk);
            places.extend([0, 1, TAG_LEN - 1, TAG_LEN, TAG_LEN + 1, 500].map(|more| begin + more));
        }
        for chunk in [0, 1, last - 1] {
            let end = chunk_at(chunk + 1);
            places.extend([end - TAG_LEN - 1, end - TAG_LEN, end - 1]);
        }
        for place in places {
            is_refused(&scene, &format!("cut at {place}"), &stream[..place]);
        }
        for place in [0, 1, 3, 27] {
            let message = is_refused_with(&scene, &format!("cut at {place}"), &stream[..place], &["-k", "k"]);
            assert!(message.ends_with("shorter than the header of a ciphertext"), "{message}");
        }
    }
}

type Chunks = Vec<Vec<u8>>;

#[test]
fn chunks_in_another_order_or_number_give_nothing() {
    let scene = Scene::new();
    for len in lengths() {
        let plaintext = random_bytes(len);
        let stream = scene.encrypt("--local", &plaintext, &[]);
        let other = scene.encrypt("--local", &random_bytes(len), &[]);
        let (head, body) = stream.split_at(STREAM_HEAD_LEN);
        let foreign: Vec<&[u8]> = other[STREAM_HEAD_LEN..].chunks(SEALED_CHUNK_LEN).collect();
        let last = foreign.len() - 1;
        let changed = |what: &str, change: &dyn Fn(&mut Chunks)| {
            let mut chunks: Chunks = body.chunks(SEALED_CHUNK_LEN).map(<[u8]>::to_vec).collect();
            change(&mut chunks);
            is_refused(&scene, what, &[head, &chunks.concat()].concat());
        };
        opens(&scene, &stream, &plaintext, &["-k", "k"]);
        changed("the first two reordered", &|chunks| chunks.swap(0, 1));
        changed("the last full ones reordered", &|chunks| chunks.swap(0, last - 1));
        changed("first and final reordered", &|chunks| chunks.swap(0, last));
        changed("all in reverse", &|chunks| chunks.reverse());
        for dropped in [0, 1, last] {
            changed("one dropped", &|chunks| drop(chunks.remove(dropped)));
        }
        changed("all dropped", &|chunks| chunks.clear());
        changed("all but the final one dropped", &|chunks| drop(chunks.drain(..last)));
        for repeated in [0, 1, last] {
            changed("one repeated", &|chunks| chunks.insert(repeated, chunks[repeated].clone()));
        }
        changed("one in place of the next", &|chunks| chunks[1] = chunks[0].clone());
        changed("the first one appended", &|chunks| chunks.push(chunks[0].clone()));
        changed("the whole body appended", &|chunks| chunks.extend(chunks.clone()));
        for at in [0, 1, last] {
            changed("one of another stream", &|chunks| chunks[at] = foreign[at].to_vec());
        }
        for added in [1, TAG_LEN, SEALED_CHUNK_LEN - 1, SEALED_CHUNK_LEN] {
            changed("zeros appended", &|chunks| chunks.push(vec![0; added]));
        }
        is_refused(&scene, "the stream itself appended", &stream.repeat(2));
    }
}

#[test]
fn a_foreign_head_key_context_or_purpose_gives_nothing() {
    let scene = Scene::new();
    let _ = run(&mut scene.kmsctl(["add", "other", "--memory"])).done();
    let context = ["table=people", "row=7"];
    for len in lengths() {
        let plaintext = random_bytes(len);
        let stream = scene.encrypt("--local", &plaintext, &context);
        let arguments = ["-k", "k", "-C", "row=7", "-C", "table=people"];
        opens(&scene, &stream, &plaintext, &arguments);
        let foreign = scene.encrypt("--remote", &plaintext, &context);
        for taken in
            [0..DEK_AT + 24, DEK_AT..BODY_AT, 0..BODY_AT, BODY_AT..BODY_AT + 24, 156..188, 132..188, 0..188]
        {
            let mut mixed = stream.clone();
            mixed[taken.clone()].copy_from_slice(&foreign[taken.clone()]);
            let message = is_refused_with(&scene, &format!("foreign {taken:?}"), &mixed, &arguments);
            assert!(message.ends_with(CHANGED), "{message}");
        }
        for other in [
            &["-k", "k"][..],
            &["-k", "k", "-C", "table=people"],
            &["-k", "k", "-C", "table=people", "-C", "row=8"],
            &["-k", "k", "-C", "table=people", "-C", "row="],
            &["-k", "k", "-C", "table=people", "-C", "row=7", "-C", "more=1"],
            &["-k", "k", "-C", "row=people", "-C", "table=7"],
        ] {
            let message = is_refused_with(&scene, "another context", &stream, other);
            assert!(message.ends_with(CHANGED), "{message}");
        }
        // Under its own key the message tells what is wrong; with the head of that key on this body there is no telling.
        let under = run(scene
            .kmsctl(["encrypt", "-k", "other", "-C", "table=people", "-C", "row=7"])
            .arg(scene.path("plaintext")))
        .done();
        let message = is_refused_with(&scene, "another key's stream", &under, &arguments);
        assert!(message.ends_with("the ciphertext was made under another key"), "{message}");
        let mixed = [&under[..BODY_AT], &stream[BODY_AT..]].concat();
        let arguments_of_other = ["-k", "other", "-C", "row=7", "-C", "table=people"];
        let message = is_refused_with(&scene, "another key's head", &mixed, &arguments_of_other);
        assert!(message.ends_with(CHANGED), "{message}");
        for purpose in [0, 1, 2, 4, 5, 0x83, 255] {
            let mut other = stream.clone();
            other[5] = purpose;
            let input = scene.put("attacked", &other);
            for way in WAYS {
                let _ = to_file(&scene, way, &input, &arguments).refusal(1);
                assert_eq!(names(&scene.out()), [""; 0], "purpose {purpose}");
            }
        }
    }
}

/// Bytes of a stream that are changed one at a time: all of the head, all tags of a short stream, and evenly the rest.
fn places(stream: &[u8], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = Vec::new();
    let tags = |chunk: Range<usize>| chunk.end - TAG_LEN..chunk.end;
    if count > STREAM_HEAD_LEN {
        places.extend(0..STREAM_HEAD_LEN);
        for chunk in (0..).map(chunk_at).take_while(|begin| *begin < stream.len()) {
            places.extend(tags(chunk..stream.len().min(chunk + SEALED_CHUNK_LEN)));
        }
    }
    let evenly = count - places.len();
    let body = stream.len() - STREAM_HEAD_LEN;
    places.extend((0..evenly).map(|number| STREAM_HEAD_LEN + number * body / evenly));
    places
}

/// Changes a byte at each of 1,000 places of two streams; not one of them opens.
fn flips(way: &str) {
    let scene = Scene::new();
    let mut tried = 0;
    for (len, count) in lengths().into_iter().zip([850, 150]) {
        let plaintext = random_bytes(len);
        let stream = scene.encrypt("--local", &plaintext, &["a=b"]);
        let arguments = ["-k", "k", "-C", "a=b"];
        opens(&scene, &stream, &plaintext, &arguments);
        let input = scene.put("attacked", &stream);
        let file = File::options().write(true).open(&input).unwrap();
        for (number, place) in places(&stream, count).into_iter().enumerate() {
            let changed = stream[place] ^ (1 << (number % 8));
            file.write_all_at(&[changed], place as u64).unwrap();
            let untouched = number.is_multiple_of(2).then(|| Untouched::put(scene.out().join("plain")));
            let ran = to_file(&scene, way, &input, &arguments);
            let message = ran.refusal(1);
            // Of a header it may be said what is wrong with it.
            assert!(place < HEADER_LEN || message == CHANGED, "byte {place}: {message}");
            match untouched {
                Some(file) => {
                    file.check();
                    fs::remove_file(file.path).unwrap();
                }
                None => assert_eq!(names(&scene.out()), [""; 0], "byte {place}"),
            }
            file.write_all_at(&stream[place..=place], place as u64).unwrap();
            tried += 1;
        }
        opens(&scene, &fs::read(&input).unwrap(), &plaintext, &arguments);
    }
    assert_eq!(tried, 1000);
}

#[test]
fn of_a_thousand_streams_with_one_changed_bit_none_opens_here() {
    flips("--local");
}

#[test]
fn of_a_thousand_streams_with_one_changed_bit_none_opens_in_the_agent() {
    flips("--remote");
}

#[test]
fn a_message_with_one_changed_bit_does_not_open() {
    let scene = Scene::new();
    let plaintext = random_bytes(20_000);
    let message = scene.agent.connect().encrypt("k", kms_tests::wire::NO_CONTEXT, &plaintext).unwrap();
    opens(&scene, &message, &plaintext, &["-k", "k"]);
    for place in (0..message.len()).step_by(199).chain(0..100) {
        let mut changed = message.clone();
        changed[place] ^= 0x80;
        let input = scene.put("attacked", &changed);
        let _ = to_file(&scene, "--local", &input, &["-k", "k"]).refusal(1);
        assert_eq!(names(&scene.out()), [""; 0]);
    }
    is_refused(&scene, "cut", &message[..message.len() - 1]);
    is_refused(&scene, "extended", &[&message[..], b"x"].concat());
}

#[test]
fn a_pipe_gets_nothing_of_a_damaged_stream_of_up_to_8_mib() {
    let scene = Scene::new();
    let plaintext = random_bytes(HELD);
    let stream = scene.encrypt("--local", &plaintext, &[]);
    let end = stream.len();
    // The last byte of the last full chunk, of the final chunk's tag, and one in the middle.
    for place in [chunk_at(HELD / CHUNK_LEN) - 1, end - 1, end / 2] {
        let mut damaged = stream.clone();
        damaged[place] ^= 1;
        is_refused(&scene, &format!("byte {place}"), &damaged);
    }
    is_refused(&scene, "no final chunk", &stream[..end - TAG_LEN]);
    for way in WAYS {
        let ran = run_with_input(&mut scene.kmsctl(["decrypt", "-k", "k", way]), &stream);
        assert!(ran.done() == plaintext);
    }
}

#[test]
fn of_a_longer_stream_a_pipe_gets_authentic_chunks_and_a_warning() {
    let scene = Scene::new();
    let plaintext = random_bytes(HELD + (4 << 20) + 5);
    let stream = scene.encrypt("--local", &plaintext, &[]);
    let late = HELD / CHUNK_LEN + 200;
    let damage = |place: usize| {
        let mut damaged = stream.clone();
        damaged[place] ^= 1;
        damaged
    };
    let full = plaintext.len() / CHUNK_LEN;
    // What is damaged, from which chunk on nothing may be given out.
    let cases = [
        (damage(chunk_at(late) + 77), late),
        (damage(stream.len() - 1), full),
        (stream[..chunk_at(late)].to_vec(), late),
        (stream[..chunk_at(late) + 100].to_vec(), late),
        ([&stream[..chunk_at(late)], &stream[chunk_at(late + 1)..]].concat(), late),
    ];
    for (number, (damaged, first)) in cases.iter().enumerate() {
        let input = scene.put("attacked", damaged);
        for way in WAYS {
            let ran = run_with_input(&mut scene.kmsctl(["decrypt", "-k", "k", way]), damaged);
            is_prefix(&ran, &plaintext, *first);
            assert!(ran.stdout.len() >= HELD, "case {number} {way}: {} bytes", ran.stdout.len());
            // Of a file the last chunk is opened before a byte is given out.
            let ran = run(scene.kmsctl(["decrypt", "-k", "k", way]).arg(&input));
            match number {
                0 => {
                    is_prefix(&ran, &plaintext, *first);
                    assert!(!ran.stdout.is_empty());
                }
                _ => assert_eq!(ran.refusal(1), CHANGED),
            }
            let _ = to_file(&scene, way, &input, &["-k", "k"]).refusal(1);
            assert_eq!(names(&scene.out()), [""; 0]);
        }
    }
}

fn is_prefix(ran: &Ran, plaintext: &[u8], chunks: usize) {
    let message = ran.message(1);
    let warned =
        format!("{CHANGED}; the output that was already written is incomplete and must not be trusted");
    assert_eq!(message, warned);
    let len = ran.stdout.len();
    assert!(len.is_multiple_of(CHUNK_LEN), "half a chunk was given out");
    assert!(len <= chunks * CHUNK_LEN, "{len} bytes were given out, chunk {chunks} is damaged");
    assert!(plaintext.starts_with(&ran.stdout), "something else was given out");
}
