//! `kms-fuzz seeds TARGET FOLDER` writes the seeds of a target, `kms-fuzz replay TARGET FILE…` runs it on files. Built for
//! fuzzing (`tests/run fuzz`) it is libFuzzer instead, for the target that the environment variable `KMS_FUZZ_TARGET` names.

#![cfg_attr(fuzzing, no_main)]
#![cfg_attr(not(fuzzing), forbid(unsafe_code))]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    static RUN: std::sync::LazyLock<fn(&[u8])> = std::sync::LazyLock::new(|| {
        let name = std::env::var("KMS_FUZZ_TARGET").unwrap_or_default();
        let target = kms_fuzz::target(&name);
        target.unwrap_or_else(|| panic!("KMS_FUZZ_TARGET names no target: {name}")).run
    });
    RUN(input);
});

#[cfg(not(fuzzing))]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let usage = "usage: kms-fuzz targets | seeds TARGET FOLDER | replay TARGET FILE…";
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next().ok_or(usage)?;
    if command == "targets" {
        kms_fuzz::TARGETS.iter().for_each(|target| println!("{}", target.name));
        return Ok(());
    }
    let name = arguments.next().ok_or(usage)?;
    let target = name.to_str().and_then(kms_fuzz::target).ok_or("there is no such target")?;
    match command.to_str() {
        Some("seeds") => {
            let folder = std::path::PathBuf::from(arguments.next().ok_or(usage)?);
            std::fs::create_dir_all(&folder)?;
            for (number, seed) in (target.seeds)().iter().enumerate() {
                std::fs::write(folder.join(format!("seed-{number:04}")), seed)?;
            }
        }
        Some("replay") => {
            for file in arguments {
                (target.run)(&std::fs::read(file)?);
            }
        }
        _ => return Err(usage.into()),
    }
    Ok(())
}
