//! placeholder
use crate::operands::*; use swiglu_kernels::families::CpuConfig;
#[derive(Debug)] pub struct CpuPlan { spec: ForwardSpec }
#[derive(Debug, thiserror::Error)] #[error("x")] pub struct CpuError;
impl CpuPlan { pub fn new(spec: ForwardSpec, _e: &[(u32, CpuConfig)]) -> Result<Self, CpuError> { Ok(Self{spec}) } pub fn spec(&self)->&ForwardSpec{&self.spec}
 pub fn launch<T: Element>(&self, _f: Forward<&[T], &mut [T]>) -> Result<(), ArgumentError> { Ok(()) } }
pub fn device() -> swiglu_db::Device { swiglu_db::Device{class:"cpu".into(),name:"cpu".into()} }
pub fn threads() -> u32 { 2 }
