//! What NVML tells of a GPU while it is timed. A machine without NVML tells nothing, and all else goes on.

use crate::race::Conditions;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::Clock;
use nvml_wrapper::{Device, Nvml};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a GPU that slowed itself down is left alone before it is timed again.
const REST: Duration = Duration::from_secs(1);
/// How often NVML is asked. By a thread of its own: while it answers, the GPU must not stand idle.
const EVERY: Duration = Duration::from_millis(10);

/// What NVML told of one GPU last, and why it slowed itself down since somebody has asked.
pub(crate) struct Telemetry {
    seen: Arc<Mutex<Conditions>>,
}

impl Telemetry {
    /// `None` without NVML. The address finds the GPU whatever order and subset CUDA was told to list.
    pub(crate) fn start(pci_bus_id: String) -> Option<Self> {
        let nvml = Nvml::init().ok()?;
        nvml.device_by_pci_bus_id(pci_bus_id.as_str()).ok()?;
        let seen = Arc::new(Mutex::new(Conditions::default()));
        let theirs = Arc::downgrade(&seen);
        thread::spawn(move || {
            let Ok(gpu) = nvml.device_by_pci_bus_id(pci_bus_id.as_str()) else { return };
            while let Some(seen) = theirs.upgrade() {
                let now = read(&gpu);
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                let slowdown = now.slowdown.or_else(|| seen.slowdown.take());
                *seen = Conditions { slowdown, ..now };
                drop(seen);
                thread::sleep(EVERY);
            }
        });
        Some(Self { seen })
    }

    /// Does `work` and tells how the GPU fared meanwhile; one that slowed itself down is given a rest.
    pub(crate) fn around<T>(&self, work: impl FnOnce() -> T) -> (T, Conditions) {
        self.take();
        let done = work();
        let conditions = self.take();
        if conditions.slowdown.is_some() {
            thread::sleep(REST);
        }
        (done, conditions)
    }

    fn take(&self) -> Conditions {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let slowdown = seen.slowdown.take();
        Conditions { slowdown, ..seen.clone() }
    }
}

fn read(gpu: &Device) -> Conditions {
    Conditions {
        sm_mhz: gpu.clock_info(Clock::SM).ok(),
        power_w: gpu.power_usage().ok().map(|milliwatts| milliwatts / 1000),
        slowdown: gpu.current_throttle_reasons().ok().and_then(slowdown),
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
