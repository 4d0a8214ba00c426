//! Tuning records: what was measured, where it is kept, which one answers a question.
//!
//! One process (the tuner) writes: the append-only [`journal`] is the truth, sled is its index
//! ([`store`]), and [`snapshot`] is the immutable file that any number of readers load.
//! Readers see two layers, the user's snapshot and the tables [`shipped`] with the crate, through
//! one [`TuningTable`]. Nothing here knows CUDA or reads the environment.
//!
//! | File in the directory | Written by | Lost or damaged |
//! |---|---|---|
//! | `journal.jsonl` | append + fsync | damaged lines are moved to `journal.damaged`, with a warning |
//! | `index.sled/` | sled | moved aside and rebuilt from the journal |
//! | `snapshot.tsv` | temporary file + rename | readers take the journal; whatever opens the store publishes it again |
//! | `tune.lock` | the running tuner | created again |

pub mod error;
mod files;
mod index;
pub mod journal;
mod lock;
pub mod lookup;
pub mod record;
pub mod shipped;
pub mod snapshot;
pub mod store;
mod verify;
mod vet;

pub use error::{FileError, NewerSchema};
pub use lock::{Holder, LockError};
pub use lookup::{Answer, Explanation, Layer, Match, Rung, TuningTable, default_dir};
pub use record::{Device, Environment, Measurement, Origin, Outcome, Record, TuningKey};
pub use store::{DbError, Taken, TuningDb};
pub use verify::{Finding, verify};
