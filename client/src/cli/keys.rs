//! The commands about keys: what is made, changed, shown, taken away, taken out.

use std::time::Duration;

use super::{
    arguments::{AddKey, Export, Global, Remove, name_and_version},
    connect,
    files::{Content, Destination},
    key_name, secrets,
    ui::{Failure, Ui},
};
use crate::{Client, Error, Fact, KeyRef, NewKey, Opcode, Status, constraint};

impl AddKey {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let name = key_name(&self.name)?;
        let import = self.import.as_deref().map(|name| secrets::import(name, self.hex)).transpose()?;
        let mut client = connect(global, ui)?;
        if global.dry_run {
            return match is_free(&mut client, name)? {
                false if self.if_missing => Ok(ui.would("keep", &self.name)?),
                false => Err(taken(&self.name, Opcode::Add)),
                true => Ok(ui.would("add", &self.name)?),
            };
        }
        let key = NewKey {
            import: import.as_ref(),
            memory_only: self.memory,
            if_missing: self.if_missing,
            lifetime: self.lifetime,
            confirm: self.confirm,
            max_uses: self.max_uses,
            exportable: self.exportable,
            ..NewKey::new(&self.name)
        };
        let added = client.add(&key).map_err(|error| Failure::of_key(&self.name, error))?;
        Ok(ui.added(&self.name, &added)?)
    }
}

pub(super) fn list(global: &Global, ui: &Ui) -> Result<(), Failure> {
    // All of it before any of it: half a listing looks like a whole one.
    let keys = connect(global, ui)?.list().collect::<Result<Vec<_>, _>>()?;
    Ok(ui.keys(&keys)?)
}

pub(super) fn describe(name: &str, global: &Global, ui: &Ui) -> Result<(), Failure> {
    let key = key_name(name)?;
    let description = connect(global, ui)?.describe(key).map_err(|error| Failure::of_key(name, error))?;
    Ok(ui.description(&description)?)
}

pub(super) fn rotate(name: &str, global: &Global, ui: &Ui) -> Result<(), Failure> {
    let key = key_name(name)?;
    let mut client = connect(global, ui)?;
    if global.dry_run {
        let _ = client.describe(key).map_err(|error| Failure::of_key(name, error))?;
        return Ok(ui.would("rotate", name)?);
    }
    let rotated = client.rotate(key).map_err(|error| Failure::of_key(name, error))?;
    Ok(ui.rotated(name, &rotated)?)
}

pub(super) fn rename(name: &str, new: &str, global: &Global, ui: &Ui) -> Result<(), Failure> {
    let key = key_name(name)?;
    let new_key = key_name(new)?;
    let mut client = connect(global, ui)?;
    if global.dry_run {
        let _ = client.describe(key).map_err(|error| Failure::of_key(name, error))?;
        return match name == new || is_free(&mut client, new_key)? {
            true => Ok(ui.would("rename", name)?),
            false => Err(taken(new, Opcode::Rename)),
        };
    }
    let renamed = client.rename(key, new).map_err(|error| match error.status() {
        // The one is about the old name, the other about the new one.
        Some(Status::Exists) => Failure::of_key(new, error),
        _ => Failure::of_key(name, error),
    })?;
    Ok(ui.renamed(name, new, renamed)?)
}

impl Remove {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let key = self.name.as_deref().map(key_name).transpose()?;
        let mut client = connect(global, ui)?;
        let (Some(name), Some(key)) = (&self.name, key) else {
            let count = match global.dry_run {
                true => client.list().try_fold(0_u64, |sum, row| {
                    row.map(|row| sum.saturating_add(u64::from(row.memory_only)))
                })?,
                false => client.remove_all()?.keys,
            };
            return Ok(ui.removed_all(count, global.dry_run)?);
        };
        let failed = |error| Failure::of_key(name, error);
        if global.dry_run {
            let _ = client.describe(key).map_err(failed)?;
            return Ok(ui.would("remove", name)?);
        }
        let removed = client.remove(key).map_err(failed)?;
        Ok(ui.removed(name, removed)?)
    }
}

impl Export {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<(), Failure> {
        let (name, version) = name_and_version(&self.name)?;
        let key = key_name(name)?;
        let destination = Destination::new(self.output.as_deref(), Content::Secret)?;
        let mut client = connect(global, ui)?;
        let failed = |error| Failure::of_key(name, error);
        let description = client.describe(key).map_err(failed)?;
        if !description.constraints.iter().any(|constraint| constraint.kind == constraint::EXPORTABLE) {
            return Err(Failure::NotExportable { name: name.to_owned() });
        }
        self.check_confirmed(name)?;
        // Whoever knows the passphrase of the last lock has said yes with it.
        let status = client.status()?;
        let is_set = |fact: &Fact| fact.name == "lock-passphrase" && fact.value == "set";
        let is_needed = status.facts.iter().any(is_set);
        if !is_needed {
            self.confirm(name)?;
        } else if !self.passphrase.is_named() {
            ui.who_asks(client.socket(), client.server_uid());
        }
        let passphrase = match is_needed || self.passphrase.is_named() {
            true => Some(self.passphrase.read(false)?),
            false => None,
        };
        let (_, secret) = match client.export(key, version, passphrase.as_ref()) {
            Err(error) if error.status() == Some(Status::NotFound) && version.is_some() => {
                return Err(Failure::NoSuchVersion {
                    name: name.to_owned(),
                    version: version.unwrap_or_default(),
                });
            }
            exported => exported.map_err(failed)?,
        };
        destination.fill(|output| output.put(secret.expose_secret()))
    }

    /// That the right name was typed, if any was.
    fn check_confirmed(&self, name: &str) -> Result<(), Failure> {
        match &self.confirm {
            Some(confirmed) if confirmed != name => Err(Failure::OtherKeyConfirmed { name: name.to_owned() }),
            _ => Ok(()),
        }
    }

    /// A person's yes: from then on nobody can tell where the key is.
    fn confirm(&self, name: &str) -> Result<(), Failure> {
        if self.confirm.is_some() {
            return Ok(());
        }
        let prompt =
            format!("The key {name} leaves the agent, and nobody can take it back. Type yes to go on: ");
        match secrets::confirm(&prompt)? {
            true => Ok(()),
            false => Err(Failure::NotConfirmed { name: name.to_owned() }),
        }
    }
}

/// Whether there is no key of that name.
fn is_free(client: &mut Client, key: KeyRef<'_>) -> Result<bool, Failure> {
    match client.describe(key) {
        Ok(_) => Ok(false),
        Err(error) if error.status() == Some(Status::NotFound) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// What the agent would have said.
fn taken(name: &str, operation: Opcode) -> Failure {
    Failure::of_key(name, Error::Refused { operation, status: Status::Exists, retry_after: Duration::ZERO })
}
