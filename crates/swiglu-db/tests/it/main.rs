//! The database from outside: what survives damage, crashes and concurrent use, and what lookups answer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod crash;
mod damage;
mod fixture;
mod journal;
mod lookup;
mod merge;
mod readers;
mod record;
mod shipped;
mod snapshot;
mod store;
mod upkeep;
mod vet;
