//! What a user of the crate `kms-client` builds is what CONTRIBUTING.md says.

use std::{env, fs, path::Path, process::Command};

#[test]
fn the_tree_in_contributing_is_the_real_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--locked", "--offline", "-p", "kms-client", "-e", "normal", "--charset", "utf8"])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    // Without the folders of this machine.
    let folder = format!(" ({}", root.display());
    let real: Vec<_> = tree.lines().map(|line| line.split(&folder).next().unwrap().trim_end()).collect();
    let text = fs::read_to_string(root.join("CONTRIBUTING.md")).unwrap();
    let (_, printed) =
        text.split_once("    kms-client v").expect("CONTRIBUTING.md has the tree of kms-client");
    let printed = format!("    kms-client v{printed}");
    let printed: Vec<_> = printed.lines().map_while(|line| line.strip_prefix("    ")).collect();
    assert_eq!(printed.join("\n"), real.join("\n"), "print it anew: cargo tree -p kms-client -e normal");
}
