//! What NVML tells of a GPU while it is timed. A machine without NVML tells nothing, and all else goes on.

use crate::race::Conditions;
use nvml_wrapper::Nvml;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::Clock;
use std::thread;
use std::time::Duration;

/// How long a GPU that slowed itself down is left alone before it is timed again.
const REST: Duration = Duration::from_secs(1);

/// One GPU, as NVML knows it.
pub(crate) struct Telemetry {
    nvml: Nvml,
    pci_bus_id: String,
}

impl Telemetry {
    /// `None` without NVML. The address finds the GPU whatever order and subset CUDA was told to list.
    pub(crate) fn new(pci_bus_id: String) -> Option<Self> {
        Nvml::init().ok().map(|nvml| Self { nvml, pci_bus_id })
    }

    /// Does `work` and tells how the GPU fared before and after it; a GPU that slowed itself down is given a rest.
    pub(crate) fn around<T>(&self, work: impl FnOnce() -> T) -> (T, Conditions) {
        let before = self.read();
        let done = work();
        let after = self.read();
        let slowdown = after.slowdown.or(before.slowdown);
        if slowdown.is_some() {
            thread::sleep(REST);
        }
        (done, Conditions { slowdown, ..after })
    }

    fn read(&self) -> Conditions {
        let Ok(gpu) = self.nvml.device_by_pci_bus_id(self.pci_bus_id.as_str()) else { return Conditions::default() };
        Conditions {
            sm_mhz: gpu.clock_info(Clock::SM).ok(),
            power_w: gpu.power_usage().ok().map(|milliwatts| milliwatts / 1000),
            slowdown: gpu.current_throttle_reasons().ok().and_then(slowdown),
        }
    }
}

/// The reasons that spoil a time. The power cap is no such reason: under it kernels are served, too.
fn slowdown(reasons: ThrottleReasons) -> Option<String> {
    let named = [
        (ThrottleReasons::HW_SLOWDOWN, "hardware slowdown"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "software thermal slowdown"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hardware thermal slowdown"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "power brake"),
    ];
    let found: Vec<&str> =
        named.into_iter().filter_map(|(reason, name)| reasons.contains(reason).then_some(name)).collect();
    (!found.is_empty()).then(|| found.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heat_spoils_a_time_and_the_power_cap_does_not() {
        assert_eq!(slowdown(ThrottleReasons::SW_POWER_CAP | ThrottleReasons::GPU_IDLE), None);
        let hot = ThrottleReasons::SW_POWER_CAP | ThrottleReasons::HW_SLOWDOWN | ThrottleReasons::HW_THERMAL_SLOWDOWN;
        assert_eq!(slowdown(hot).as_deref(), Some("hardware slowdown, hardware thermal slowdown"));
    }
}
