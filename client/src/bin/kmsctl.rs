//! The command-line tool; everything lives in the library.

fn main() -> std::process::ExitCode {
    kms_client::cli::main()
}
