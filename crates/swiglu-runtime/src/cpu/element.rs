//! What the CPU multiplies: the number formats of memory and those of sums.

use crate::operands::Element;
use faer::traits::ComplexField;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};
use swiglu_kernels::DType;

/// A number format of sums: `f32` or `f64`.
pub trait Sum:
    ComplexField
    + Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + Neg<Output = Self>
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    /// 1.
    const ONE: Self;
    /// `exp`, which the compiler can vectorise where the type is `f32`.
    fn exp(self) -> Self;
}

impl Sum for f32 {
    const ONE: Self = 1.0;
    #[inline]
    fn exp(self) -> Self {
        super::silu::exp(self)
    }
}

impl Sum for f64 {
    const ONE: Self = 1.0;
    fn exp(self) -> Self {
        self.exp()
    }
}

/// A type that the CPU takes: every [`Element`], and `f64` in the place of `f32`, for checks of the formulas themselves.
pub trait CpuElement: Copy + Send + Sync + 'static {
    /// What its products are summed in.
    type Sum: Sum;
    /// Whether elements of this type are what `dtype` stores.
    fn stores(dtype: DType) -> bool;
    /// Exact widening.
    fn widen(self) -> Self::Sum;
    /// Round to nearest, ties to even.
    fn round(sum: Self::Sum) -> Self;
    /// The slice itself where this is the type of the sums.
    fn as_sums(_slice: &[Self]) -> Option<&[Self::Sum]> {
        None
    }
}

impl<T: Element> CpuElement for T {
    type Sum = f32;
    fn stores(dtype: DType) -> bool {
        <T as Element>::stores(dtype)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(sum: f32) -> Self {
        Self::from_f32(sum)
    }
    fn as_sums(slice: &[Self]) -> Option<&[f32]> {
        Self::as_f32(slice)
    }
}

impl CpuElement for f64 {
    type Sum = f64;
    fn stores(dtype: DType) -> bool {
        dtype == DType::F32
    }
    fn widen(self) -> f64 {
        self
    }
    fn round(sum: f64) -> Self {
        sum
    }
    fn as_sums(slice: &[Self]) -> Option<&[f64]> {
        Some(slice)
    }
}
