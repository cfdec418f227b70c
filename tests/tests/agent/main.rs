//! Scenarios of the shipped agent over its real socket.
//!
//! One binary, so that the scenarios share the machine's cores; each starts an agent of its own and, unless it says
//! otherwise, ends with that agent stopped, its folder empty and no panic counted.

mod activated;
mod bare;
mod batch;
mod constraints;
mod desk;
mod forget;
mod frames;
mod hostile;
mod keys;
mod lock;
mod made;
mod many;
mod memory;
mod operations;
mod pairs;
mod peers;
mod place;
mod sandbox;
mod start;
mod statuses;
mod stdio;
mod ways;
