//! What a dropped HMAC state leaves in memory. Its type is not marked `ZeroizeOnDrop`, though its parts are, so that is looked at.

use kms_envelope::ExpandKey;
use kms_tests::sys::before_and_after_drop;

#[test]
fn a_dropped_expand_key_leaves_nothing_in_memory() {
    let (alive, dead) = before_and_after_drop(ExpandKey::new(&[0x5a; 32]));
    // Two chaining values of 64 bytes, which look random.
    assert!(alive.iter().filter(|&&b| b != 0).count() > 100);
    assert!(dead.iter().all(|&b| b == 0), "{dead:02x?}");
}
