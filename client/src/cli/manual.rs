//! Completions and manual pages, generated from the command line itself, so that they cannot say anything else than `--help`.

use std::{
    fs,
    io::{self, Write as _},
};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man as Page;

use super::{
    arguments::{Arguments, Man},
    ui::{Failure, Ui, print_bytes},
};

/// What stands at the end of every page.
const BEHIND: &str = "\
.SH \"EXIT STATUS\"
0 done; 1 refused or failed; 2 no agent can be reached, or none that is to be trusted; 3 the agent is locked; 64 bad usage; 75 try
again later.
.SH ENVIRONMENT
KMS_AUTH_SOCK names the socket of the agent, unless \\fB\\-\\-socket\\fR does.
.SH \"SEE ALSO\"
\\fBkmsctl\\fR(1), \\fBkms\\-agent\\fR(1)
";

/// What a manual has to say on the rights that a ciphertext of a stream gives, and on locks.
const BEYOND: &str = "\
.SH SECURITY
The agent hands out the key of one stream at a time (\\fB\\-\\-local\\fR, the default). Who has opened a stream can keep that key, and
write other data under its head; a lock or a removal reaches only keys that were not handed out yet.
.PP
Passphrases come from the terminal, a file or a descriptor, never from arguments or the environment. Plain keys never go to
a terminal in binary.
";

/// The whole command line, with everything filled in that clap derives.
fn commands() -> Command {
    let mut command = Arguments::command();
    command.build();
    command
}

pub(super) fn completions(shell: Shell) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "kmsctl", &mut text);
    Ok(print_bytes(&text)?)
}

impl Man {
    pub(super) fn run(&self, ui: &Ui) -> Result<(), Failure> {
        let all = commands();
        if let Some(folder) = &self.folder {
            let failed = |path: &std::path::Path| {
                let path = path.to_owned();
                move |source| Failure::Create { path, source }
            };
            fs::create_dir_all(folder).map_err(failed(folder))?;
            for (name, page) in pages(&all).map_err(failed(folder))? {
                let path = folder.join(format!("{name}.1"));
                fs::write(&path, page).map_err(failed(&path))?;
                ui.wrote(&path);
            }
            return Ok(());
        }
        let name = match &self.command {
            Some(command) => format!("kmsctl-{command}"),
            None => "kmsctl".to_owned(),
        };
        let page = pages(&all)?.into_iter().find(|(page, _)| *page == name);
        let (_, page) = page.ok_or(Failure::NoPage)?;
        Ok(print_bytes(&page)?)
    }
}

/// Name and text of each page.
fn pages(all: &Command) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut pages = vec![("kmsctl".to_owned(), page(all, "kmsctl")?)];
    for command in all.get_subcommands() {
        let name = format!("kmsctl-{}", command.get_name());
        let text = page(command, &name)?;
        pages.push((name, text));
    }
    Ok(pages)
}

fn page(command: &Command, name: &str) -> io::Result<Vec<u8>> {
    let name: &'static str = String::leak(name.to_owned());
    // The page is about the words as they are typed, also those that are only another name of an argument.
    let command = command.clone().name(name).display_name(name).mut_args(|argument| {
        let other = argument
            .get_visible_aliases()
            .and_then(|others| others.first().map(|other| format!("; also --{other}")));
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        match other {
            Some(other) => argument.help(help + &other),
            None => argument,
        }
    });
    let page = Page::new(command.clone()).title(name.to_uppercase()).date("");
    let page = page.source(concat!("kmsctl ", env!("CARGO_PKG_VERSION"))).manual("kms-agent");
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
        text.write_all(BEYOND.as_bytes())?;
    }
    text.write_all(BEHIND.as_bytes())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use clap_complete::Generator;

    use super::*;

    /// Every word that `--help` lists as an argument of a command.
    fn flags(command: &Command) -> Vec<String> {
        let help = command.clone().render_long_help().to_string();
        let words = help.split(|c: char| c.is_whitespace() || matches!(c, ',' | '[' | ']' | '`'));
        let is_flag = |word: &&str| word.starts_with('-') && word.len() > 1 && !word.contains('=');
        words.filter(is_flag).map(|word| word.trim_end_matches(['.', ';', ':']).to_owned()).collect()
    }

    #[test]
    fn every_flag_of_the_help_is_in_the_manual() {
        let all = commands();
        let pages = pages(&all).unwrap();
        assert_eq!(pages.len(), all.get_subcommands().count() + 1);
        for (name, page) in pages {
            let text =
                String::from_utf8(page).unwrap().replace("\\-", "-").replace("\\fB", "").replace("\\fR", "");
            let command = match name.strip_prefix("kmsctl-") {
                Some(command) => all.find_subcommand(command).unwrap(),
                None => &all,
            };
            let flags = flags(command);
            assert!(flags.len() > 10, "{name}: {flags:?}");
            for flag in flags {
                assert!(text.contains(&flag), "{flag} of {name} is not in its page");
            }
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                assert!(!help.is_empty(), "{name} {}", argument.get_id());
            }
        }
    }

    #[test]
    fn the_main_page_lists_every_command() {
        let all = commands();
        let text = String::from_utf8(page(&all, "kmsctl").unwrap()).unwrap().replace("\\-", "-");
        for command in all.get_subcommands() {
            assert!(text.contains(&format!("kmsctl-{}(1)", command.get_name())), "{}", command.get_name());
        }
    }

    #[test]
    fn every_shell_completes_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "kmsctl", &mut text);
            let text = String::from_utf8(text).unwrap();
            for command in commands().get_subcommands() {
                assert!(text.contains(command.get_name()), "{} {}", shell.file_name(""), command.get_name());
            }
        }
    }
}
