//! Tests that need what the crate does not export: Wycheproof against the parts, and the worked examples of `docs/formats.md`.

mod worked_examples;
mod wycheproof;

/// That HMAC states are wiped, which their type does not say, is tested in `tests/wiped.rs`.
#[test]
fn expanded_keys_and_derived_bytes_are_wiped_on_drop() {
    fn check<T: zeroize::ZeroizeOnDrop>() {}
    crate::aead::is_wiped_on_drop();
    check::<crate::cobblestone::Derived>();
    crate::stream::is_wiped_on_drop();
}
