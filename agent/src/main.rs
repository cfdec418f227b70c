//! The daemon; everything lives in the library.

fn main() -> std::process::ExitCode {
    kms_agent::main()
}
