//! Every seed and every input of the corpora, without libFuzzer.

#![expect(clippy::panic, clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{collections::BTreeSet, fs, path::Path};

use kms_fuzz::{TARGETS, target};

const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus");

fn replay(name: &str) {
    let target = target(name).unwrap();
    let mut inputs = (target.seeds)();
    assert!(inputs.len() >= 10, "{name} has only {} seeds", inputs.len());
    let stored = Path::new(CORPUS).join(name);
    for entry in fs::read_dir(&stored).unwrap_or_else(|error| panic!("{}: {error}", stored.display())) {
        inputs.push(fs::read(entry.unwrap().path()).unwrap());
    }
    // What every decoder has to stand.
    inputs.extend([vec![], vec![0], vec![0xff; 64], vec![0; 4096]]);
    for input in &inputs {
        (target.run)(input);
    }
}

macro_rules! replays {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            replay(stringify!($name));
        })*

        #[test]
        fn every_target_is_replayed() {
            let told = BTreeSet::from([$(stringify!($name)),*]);
            assert_eq!(told, TARGETS.iter().map(|target| target.name).collect());
        }
    };
}

replays! { frame request reply codecs constraints context ciphertext handler client }

#[test]
fn the_corpora_stay_small() {
    let (mut files, mut bytes) = (0, 0);
    for folder in fs::read_dir(CORPUS).unwrap() {
        for entry in fs::read_dir(folder.unwrap().path()).unwrap() {
            files += 1;
            bytes += entry.unwrap().metadata().unwrap().len();
        }
    }
    assert!(files <= 1500 && bytes <= 300 * 1024, "{files} files, {bytes} bytes");
}
