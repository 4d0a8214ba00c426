//! How the two weight matrices lie in memory. A layout is a type, never guessed from a shape.

use crate::problem::{UnknownName, WeightMajor, names};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Memory layout of the gate and up weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightLayout {
    /// One matrix `[K, 2N]`: gate columns beside up columns (the `Wf` of fused-swiglu).
    PackedKn,
    /// One matrix `[2N, K]`: gate rows above up rows (merged `gate_up_proj`).
    PackedNk,
    /// Two matrices `[N, K]` (two `nn.Linear`).
    SeparateNk,
    /// Two matrices `[K, N]`.
    SeparateKn,
}

impl WeightLayout {
    /// Every layout.
    pub const ALL: [Self; 4] = [Self::PackedKn, Self::PackedNk, Self::SeparateNk, Self::SeparateKn];

    /// Which index is contiguous.
    pub const fn major(self) -> WeightMajor {
        match self {
            Self::PackedKn | Self::SeparateKn => WeightMajor::N,
            Self::PackedNk | Self::SeparateNk => WeightMajor::K,
        }
    }

    /// Whether gate and up share one matrix.
    pub const fn is_packed(self) -> bool {
        match self {
            Self::PackedKn | Self::PackedNk => true,
            Self::SeparateNk | Self::SeparateKn => false,
        }
    }

    /// Rows and columns of each matrix the caller passes.
    pub const fn shape(self, n: usize, k: usize) -> (usize, usize) {
        match self {
            Self::PackedKn => (k, 2 * n),
            Self::PackedNk => (2 * n, k),
            Self::SeparateNk => (n, k),
            Self::SeparateKn => (k, n),
        }
    }

    /// Elements from the start of a packed matrix to its second half; `None` for separate ones, and where they are more than can be
    /// counted: of a matrix without elements, whose stride may be any.
    pub const fn second_half(self, n: usize, row_stride: usize) -> Option<usize> {
        match self {
            Self::PackedKn => Some(n),
            Self::PackedNk => n.checked_mul(row_stride),
            Self::SeparateNk | Self::SeparateKn => None,
        }
    }
}

/// Which half of a packed matrix is the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateOrder {
    /// Gate, then up: Llama's merged weights, Phi-3, vLLM, Liger.
    GateFirst,
    /// Up, then gate: the order that fused-swiglu's kernels compute.
    UpFirst,
}

names!(WeightLayout, "weight layout",
    WeightLayout::PackedKn => "packed_kn", WeightLayout::PackedNk => "packed_nk",
    WeightLayout::SeparateNk => "separate_nk", WeightLayout::SeparateKn => "separate_kn");
names!(GateOrder, "gate order", GateOrder::GateFirst => "gate_first", GateOrder::UpFirst => "up_first");
