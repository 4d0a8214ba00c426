//! Host-side benches of the workspace; see `benches/README.md`.
