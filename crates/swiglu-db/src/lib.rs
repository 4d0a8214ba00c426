//! Tuning records: what was measured, where it is kept, which one answers a question.
//!
//! One process (the tuner) writes: the append-only [`journal`] is the truth, sled is its index
//! ([`store`]), and [`snapshot`] is the immutable file that any number of readers load.
//! Nothing here knows CUDA.

pub mod journal;
pub mod lookup;
pub mod record;
pub mod shipped;
pub mod snapshot;
pub mod store;

pub use lookup::{Lookup, Match, TuningTable};
pub use record::{Device, Environment, Measurement, Outcome, Record, TuningKey};
pub use store::TuningDb;
