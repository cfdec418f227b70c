//! What changes, lists or gives out keys (`docs/protocol.md`, sections 4.8 to 4.15).

use kms_envelope::{KEY_LEN, KeyVersion};
use kms_protocol::{
    Add, Added, Description, Exported, KeyName, KeyRow, KeyState, Listed, Material, Removed, RemovedAll,
    Renamed, Rotated, Status, VersionRow,
};
use zeroize::Zeroize;

use super::{Core, Now, Outcome, TicketPurpose, push, refusal::Refused, secret_passphrase};
use crate::{
    audit::{Audit, Event},
    authorize::Permit,
    constraints::Constraints,
    crypto::Random,
    keyring::{Found, KeySummary, Selector, VersionSummary},
    reply::Replies,
};

impl<R: Random, A: Audit> Core<R, A> {
    pub(super) fn add(
        &mut self,
        permit: &Permit,
        uid: u32,
        fields: &Add<'_>,
        material: &[u8],
        now: Now,
    ) -> Result<Added, Refused> {
        let name = KeyName::parse(fields.name).map_err(|_| Status::Malformed)?;
        let mut constraints = Constraints::parse(&fields.constraints)?;
        constraints.memory_only |= self.limits.memory_only;
        constraints.lifetime = constraints.lifetime.or(self.limits.lifetime);
        let import = match fields.material {
            Material::Generate if material.is_empty() => None,
            Material::Import => Some(material.try_into().map_err(|_| Status::Malformed)?),
            Material::Generate => return Err(Status::Malformed.into()),
        };
        if fields.if_missing
            && let Ok(summary) = self.keyring.describe(permit, Selector::Name(name))
        {
            return Ok(added(&summary, false));
        }
        if !constraints.memory_only {
            return Err(Status::StoreUnavailable.into());
        }
        let (keys_max, random) = (self.limits.keys, &mut self.random);
        let summary =
            self.keyring.add(permit, name, import, constraints, keys_max, now.boot, now.unix, random)?;
        self.audit.record(&Event::Added { uid, key: summary.id });
        Ok(added(&summary, true))
    }

    pub(super) fn list(
        &mut self,
        permit: &Permit,
        cursor: u64,
        now: Now,
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let (rows, next) = self.keyring.page(permit, cursor)?;
        let mut listed = Listed { keys: rows.iter().map(|summary| row(summary, now)).collect(), next };
        let pushed = push(replies, request_id, &listed);
        listed.keys.iter_mut().for_each(|row| row.name.zeroize());
        pushed
    }

    pub(super) fn describe(
        &mut self,
        permit: &Permit,
        key: Selector<'_>,
        versions_after: u32,
        now: Now,
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let summary = self.keyring.describe(permit, key)?;
        let (versions, more) = self.keyring.versions_after(permit, key, versions_after)?;
        let mut description = Description {
            key: row(&summary, now),
            versions: versions.iter().map(version_row).collect(),
            more,
            constraints: summary.constraints.to_list(),
        };
        let pushed = push(replies, request_id, &description);
        description.key.name.zeroize();
        pushed
    }

    pub(super) fn remove(
        &mut self,
        permit: &Permit,
        uid: u32,
        key: Selector<'_>,
    ) -> Result<Removed, Refused> {
        let id = self.keyring.remove(permit, key)?;
        self.streams.end_key(id);
        self.audit.record(&Event::Removed { uid, key: id });
        Ok(Removed { id: *id.as_bytes() })
    }

    pub(super) fn remove_all(&mut self, permit: &Permit, uid: u32) -> Result<RemovedAll, Refused> {
        let keys = self.keyring.remove_all(permit)? as u64;
        self.streams.end_all();
        self.audit.record(&Event::RemovedAll { uid, keys });
        Ok(RemovedAll { keys })
    }

    pub(super) fn rotate(
        &mut self,
        permit: &Permit,
        uid: u32,
        key: Selector<'_>,
        now: Now,
    ) -> Result<Rotated, Refused> {
        let versions_max = self.limits.keys;
        let summary = self.keyring.rotate(permit, key, versions_max, now.unix, &mut self.random)?;
        let version = summary.primary.value();
        self.audit.record(&Event::Rotated { uid, key: summary.id, version });
        Ok(Rotated { id: *summary.id.as_bytes(), version, check_value: summary.check_value })
    }

    pub(super) fn rename(
        &mut self,
        permit: &Permit,
        uid: u32,
        key: Selector<'_>,
        name: &str,
    ) -> Result<Renamed, Refused> {
        let name = KeyName::parse(name).map_err(|_| Status::Malformed)?;
        let id = self.keyring.rename(permit, key, name)?;
        self.audit.record(&Event::Renamed { uid, key: id });
        Ok(Renamed { id: *id.as_bytes() })
    }

    #[expect(clippy::too_many_arguments, reason = "what every request comes with")]
    pub(super) fn export(
        &mut self,
        permit: Permit,
        uid: u32,
        key: Result<Selector<'_>, Refused>,
        version: u32,
        passphrase: &[u8],
        request_id: u32,
        now: Now,
        replies: &mut Replies,
    ) -> Result<Outcome, Refused> {
        let salt = self.keyring.lock_salt();
        //= docs/protocol.md#3-statuses
        //# `denied` and `locked`; everything else, the rules for names among it.
        if salt.is_some() && passphrase.is_empty() {
            return Err(Status::Denied.into());
        }
        let key = &self.keyring.find(&permit, key?)?;
        // Before any passphrase is worked on: what is not exportable is so with the right one too.
        self.keyring.check_exportable(&permit, key)?;
        match salt {
            //= docs/protocol.md#414-export
            //# for a payload where the agent was not locked since its start
            None if !passphrase.is_empty() => Err(Status::Malformed.into()),
            None => {
                self.give_out(&permit, uid, key, version, request_id, replies)?;
                Ok(Outcome::Continue)
            }
            Some(salt) => {
                let passphrase = secret_passphrase(passphrase)?;
                self.back_off(uid, now)?;
                let purpose = TicketPurpose::Export { key: key.id, version };
                self.derive(passphrase, salt, request_id, permit, uid, purpose)
            }
        }
    }

    /// Hands out the bytes of a key, once everything else was checked.
    pub(super) fn give_out(
        &mut self,
        permit: &Permit,
        uid: u32,
        key: &Found,
        version: u32,
        request_id: u32,
        replies: &mut Replies,
    ) -> Result<(), Refused> {
        let version = KeyVersion::new(version).unwrap_or(key.primary);
        let exported = Exported { id: *key.id.as_bytes(), version: version.value() };
        let keyring = &mut self.keyring;
        replies.push(request_id, &exported, KEY_LEN, |out| {
            keyring.export(permit, key, version, |bytes| {
                for (to, from) in out.iter_mut().zip(bytes) {
                    *to = *from;
                }
            })
        })??;
        self.audit.record(&Event::Exported { uid, key: key.id, version: version.value() });
        Ok(())
    }
}

fn added(summary: &KeySummary, created: bool) -> Added {
    Added {
        id: *summary.id.as_bytes(),
        version: summary.primary.value(),
        check_value: summary.check_value,
        created,
    }
}

fn row(summary: &KeySummary, now: Now) -> KeyRow {
    // Rounded up: what shows 0 seconds is gone.
    let left = summary.expires.map(|expires| expires.saturating_sub(now.boot));
    KeyRow {
        name: summary.name.as_str().to_owned(),
        id: *summary.id.as_bytes(),
        memory_only: summary.constraints.memory_only,
        state: KeyState::Enabled,
        primary: summary.primary.value(),
        minimum: 1,
        versions: summary.versions,
        check_value: summary.check_value,
        created: summary.created,
        expires_in: left.map(|left| left.as_secs().saturating_add(u64::from(left.subsec_nanos() > 0))),
        uses: summary.uses,
    }
}

fn version_row(summary: &VersionSummary) -> VersionRow {
    VersionRow {
        version: summary.version.value(),
        state: KeyState::Enabled,
        check_value: summary.check_value,
        created: summary.created,
        uses: summary.uses,
    }
}
