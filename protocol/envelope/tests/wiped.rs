//! What a dropped HMAC state leaves in memory. Its type is not marked `ZeroizeOnDrop`, though its parts are, so that is looked at.

#![expect(unsafe_code, reason = "looks at the memory of a value after its drop")]

use std::mem::{MaybeUninit, size_of};

use kms_envelope::ExpandKey;

fn bytes_of(slot: &MaybeUninit<ExpandKey>) -> Vec<u8> {
    let start = slot.as_ptr().cast::<u8>();
    // SAFETY: the slot is alive and `size_of::<ExpandKey>()` bytes long; it was zeroed before it was written, and the reads are volatile,
    // so each is of a byte that exists in memory, whatever the compiler knows of the value that was there.
    (0..size_of::<ExpandKey>()).map(|i| unsafe { start.add(i).read_volatile() }).collect()
}

#[test]
fn a_dropped_expand_key_leaves_nothing_in_memory() {
    let mut slot = Box::new(MaybeUninit::<ExpandKey>::zeroed());
    slot.write(ExpandKey::new(&[0x5a; 32]));
    let alive = bytes_of(&slot);
    // Two chaining values of 64 bytes, which look random.
    assert!(alive.iter().filter(|&&b| b != 0).count() > 100);
    // SAFETY: the value was written above and is not used again.
    unsafe { slot.assume_init_drop() };
    let dead = bytes_of(&slot);
    assert!(dead.iter().all(|&b| b == 0), "{dead:02x?}");
}
