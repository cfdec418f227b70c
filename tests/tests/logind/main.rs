//! The lock of the session, the sleep of the machine, and the process that watches for them: the shipped agent on a message bus
//! of the test's own, with a logind that does what the test says.

mod bus;
mod locks;
mod process;

use kms_tests::{Agent, AgentBuilder, Wire};

use self::bus::Bus;

/// An agent that finds this bus where the system's is.
fn on(bus: &Bus, lock_on: &str) -> AgentBuilder {
    Agent::builder()
        .environment("DBUS_SYSTEM_BUS_ADDRESS", &bus.address())
        .config(&format!("log = \"info\"\nlock_on = {lock_on}\n"))
}

/// The number of keys, after everything that was told to the agent before this call.
fn keys(wire: &mut Wire) -> usize {
    // What came at the same time as the first request is dealt with after it.
    wire.list().unwrap();
    wire.list().unwrap().len()
}
