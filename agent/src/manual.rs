//! The manual page (`--man`), made from the command line itself, so that it cannot say anything else than `--help`.

use std::io::{self, Write as _};

use clap::CommandFactory;
use clap_mangen::Man;

use crate::args::Args;

/// What stands at the end of the page.
const BEHIND: &str = "\
.SH SIGNALS
SIGTERM and SIGINT wipe and end; SIGHUP reads the configuration again, and a bad file leaves the old one in force, with a message.
.SH \"EXIT STATUS\"
0 done; 1 refused or failed; 64 bad usage. With COMMAND its own status, 126 if it cannot be run, 127 if it is not found.
.SH ENVIRONMENT
KMS_AUTH_SOCK names the socket and KMS_AGENT_PID the process: both are set for COMMAND and read by \\fB\\-k\\fR. SHELL decides for which
shell is printed. XDG_RUNTIME_DIR is where the folder of the socket is; without it /run/user/UID, or a new folder in TMPDIR.
LISTEN_PID and LISTEN_FDS hand over the socket of systemd, with \\fB\\-D\\fR alone.
.SH FILES
$XDG_RUNTIME_DIR/kms\\-agent/agent.sock, $XDG_CONFIG_HOME/kms\\-agent/config.toml. Every directory on the way to the socket must belong to
root or to the agent's user, and the last one must not be writable by others.
.SH \"SEE ALSO\"
\\fBkmsctl\\fR(1)
";

pub(crate) fn print() -> io::Result<()> {
    let page = Man::new(Args::command()).title("KMS-AGENT").date("").manual("kms-agent");
    let page = page.source(concat!("kms-agent ", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    text.write_all(BEHIND.as_bytes())?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&text)?;
    stdout.flush()
}
