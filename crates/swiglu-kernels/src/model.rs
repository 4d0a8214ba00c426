//! What a config should take, from its tiles alone: waves, arithmetic, traffic of L2 and DRAM. It orders candidates before
//! anything is compiled; what it says in microseconds is not to be believed.

use crate::arch::{self, ArchSpec};
use crate::families::wgmma_tma::{RESERVED_BYTES, is_split};
use crate::families::{self, Config, Family, LaunchShape, Schedule, Staging, Target, WgmmaStreamConfig};
use crate::problem::{DType, Format, INT4_GROUP, Problem};

/// What decides speed, as far as a device's class tells it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chip {
    arch: &'static ArchSpec,
    sms: f64,
    l2_bytes: f64,
    bytes_per_second: f64,
}

/// Clock of the multiprocessors in Hz when all of them multiply, held by power, and what it gains when few do.
const CLOCK: f64 = 1.4e9;
const BOOST: f64 = 0.5e9;
/// Share of the memory's peak rate that a long read reaches.
const DRAM_SHARE: f64 = 0.9;
/// Bytes a second that one multiprocessor gets from L2: 64 a clock, when clocks are not held by power.
const L2_BYTES_PER_SECOND: f64 = 64.0 * 1.7e9;
/// Share of L2 in which a matrix stays while others pass.
const L2_SHARE: f64 = 0.5;
/// Bytes one multiprocessor has to have on their way to draw its share of the memory's rate.
const IN_FLIGHT: f64 = 32768.0;
/// The architecture whose measurements the constants are from.
const CALIBRATED: &str = "sm_90a";
/// Times closer than this factor the model cannot tell apart.
const ERROR: f64 = 1.15;
/// Launch, the first loads, the last stores, in microseconds.
const OVERHEAD_US: f64 = 3.0;

impl Chip {
    /// What a device class tells, `sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz` say; `None` for a CPU, or a class that
    /// tells too little.
    pub fn of_class(class: &str) -> Option<Self> {
        Some(Self {
            arch: arch::by_name(class.split('-').next()?).ok()?,
            sms: part_of_class(class, "sm", "")?,
            l2_bytes: part_of_class(class, "l2_", "m")? * f64::from(1 << 20),
            bytes_per_second: bandwidth(class)?,
        })
    }

    /// What should serve `problem` where nothing was tuned: the best by this model, where it is better than `default` by more
    /// than the model errs. Only where it was calibrated, on one architecture and for 16-bit formats, and only what has run
    /// there.
    pub fn better_than(&self, default: &Config, problem: &Problem) -> Option<Config> {
        if !self.is_calibrated(problem.dtype) {
            return None;
        }
        let time = |config: &Config| self.predict_us(problem, config).filter(|us| us.is_finite());
        let candidates = families::candidates(problem, Target::Gpu(self.arch)).into_iter();
        let known = candidates.filter(|config| config.family() != Family::MmaDirect);
        let timed = known.filter_map(|config| Some((time(&config)?, config)));
        let (us, best) = timed.min_by(|a, b| a.0.total_cmp(&b.0))?;
        (us * ERROR < time(default)?).then_some(best)
    }

    fn is_calibrated(&self, dtype: DType) -> bool {
        self.arch.name == CALIBRATED && matches!(dtype, DType::F16 | DType::Bf16)
    }

    /// What a config that took `us` microseconds for `problem` should take for `m` tokens: that times what the model says there
    /// over what it says here, so that its error cancels. Where it says nothing, or was not calibrated, waves of tiles stand for
    /// time. `None` for a CPU's config and a library's.
    pub fn at_other_m(&self, us: f64, problem: &Problem, config: &Config, m: u32) -> Option<f64> {
        let is_modelled = self.is_calibrated(problem.dtype) && config.family() != Family::MmaDirect;
        let time = |problem: &Problem| {
            let modelled = if is_modelled { self.predict_us(problem, config) } else { None };
            modelled.or_else(|| self.work(problem, config))
        };
        Some(us * time(&problem.with_m(m))? / time(problem)?)
    }

    /// The time of one launch, in microseconds; `None` for what is no kernel of ours, and for what is no forward.
    pub fn predict_us(&self, problem: &Problem, config: &Config) -> Option<f64> {
        let shape = config.launch_shape(problem).filter(|_| problem.op.is_forward())?;
        let tiles = Tiles::new(problem, &shape);
        // The multiprocessor with the most tiles ends last.
        let per_sm = (tiles.count() / (self.sms / f64::from(shape.cluster)).floor().max(1.0)).ceil();
        let active = tiles.count() * f64::from(shape.cluster) / (per_sm * self.sms);
        let clock = CLOCK + BOOST * (1.0 - active).max(0.0);
        let per_second = clock * self.flops_per_clock(problem, config)?;
        let arithmetic = per_sm * tiles.flops(problem) / f64::from(shape.cluster) / per_second;
        let l2 = per_sm * tiles.bytes(problem) / f64::from(shape.cluster) / L2_BYTES_PER_SECOND;
        let resident = resident(problem, &shape, self.arch).min(per_sm);
        let in_flight = (resident * in_flight(config, bytes_of(problem.dtype.weights())) / IN_FLIGHT).min(1.0);
        let dram = self.dram_bytes(problem, &shape, &tiles) / (DRAM_SHARE * self.bytes_per_second * in_flight);
        let prologue = match config {
            // Reads the operands and writes their parts.
            Config::WgmmaTma(_) if is_split(problem.dtype) => {
                let (x, weights) = operand_bytes(problem);
                2.0 * (x + weights) / (DRAM_SHARE * self.bytes_per_second)
            }
            _ => 0.0,
        };
        // The longest decides, and what is nearly as long is not hidden wholly.
        let together = [arithmetic, l2, dram].iter().map(|time| time.powi(4)).sum::<f64>().sqrt().sqrt();
        Some(OVERHEAD_US + (prologue + together) * 1e6)
    }

    /// How long a config takes, in units of its own: its waves of tiles, and the length of their sums where M is what is summed
    /// over. `None` for a CPU's config and a library's.
    fn work(&self, problem: &Problem, config: &Config) -> Option<f64> {
        let shape = config.launch_shape(problem)?;
        let per_sm = resident(problem, &shape, self.arch).min(shape.per_sm.map_or(f64::INFINITY, f64::from));
        let slots = (self.sms * per_sm / f64::from(shape.cluster.max(1))).max(1.0) as u64;
        let depth = problem.product().filter(|_| problem.sums_over_m()).map_or(1, |product| product.depth.max(1));
        let tiles = shape.tiles(problem);
        let waves = match config {
            // A last wave that is cut up takes half of one (docs/kernels/wgmma_gemm.md).
            Config::WgmmaGemm(gemm) if gemm.cuts(tiles, slots) => (tiles / slots) as f64 + 0.5,
            _ => tiles.div_ceil(slots).max(1) as f64,
        };
        Some(waves * f64::from(depth))
    }

    /// Operations a clock of one multiprocessor.
    fn flops_per_clock(&self, problem: &Problem, config: &Config) -> Option<f64> {
        let of_dtype = |dtype| flops_per_clock(self.arch.name, dtype).or_else(|| flops_per_clock("sm_90a", dtype));
        let per_clock = match (config, problem.dtype) {
            (Config::Simt(_), _) => 256.0,
            // Three products for one, and the sums between.
            (Config::WgmmaTma(_), DType::F32) => of_dtype(DType::F16)? / 3.3,
            (_, DType::F32) => of_dtype(DType::Tf32)? / 4.0,
            (_, dtype) => of_dtype(dtype)?,
        };
        Some(per_clock * efficiency(config))
    }

    /// Bytes from and to memory: each matrix once, and again for every band of tiles that it outlives L2 for.
    fn dram_bytes(&self, problem: &Problem, shape: &LaunchShape, tiles: &Tiles) -> f64 {
        let (x, weights) = operand_bytes(problem);
        let outputs = f64::from(problem.op.outputs()) * f64::from(problem.m) * f64::from(problem.n);
        let z = outputs * bytes_of(problem.dtype.output());
        let group = f64::from(shape.raster_group.max(1));
        let (of_x, of_weights) =
            if shape.raster.is_along_n() { (1.0, (tiles.m / group).ceil()) } else { ((tiles.n / group).ceil(), 1.0) };
        let read = |matrix: f64, times: f64| matrix * if matrix < L2_SHARE * self.l2_bytes { 1.0 } else { times };
        read(x, of_x) + read(weights, of_weights) + z
    }
}

/// Bytes of x and of both weights.
fn operand_bytes(problem: &Problem) -> (f64, f64) {
    let (m, n, k) = (f64::from(problem.m), f64::from(problem.n), f64::from(problem.k));
    (m * k * bytes_of(problem.dtype.x()), 2.0 * n * k * bytes_of(problem.dtype.weights()))
}

/// The output in tiles, of a cluster each.
struct Tiles {
    m: f64,
    n: f64,
    block_m: f64,
    block_n: f64,
}

impl Tiles {
    fn new(problem: &Problem, shape: &LaunchShape) -> Self {
        let along = |size: u32, block: u32| f64::from(size.div_ceil(block.max(1)));
        Self {
            m: along(problem.m, shape.block_m),
            n: along(problem.n, shape.block_n),
            block_m: f64::from(shape.block_m),
            block_n: f64::from(shape.block_n),
        }
    }

    fn count(&self) -> f64 {
        self.m * self.n
    }

    /// Of one tile, edges included.
    fn flops(&self, problem: &Problem) -> f64 {
        4.0 * self.block_m * self.block_n * f64::from(problem.k)
    }

    /// Of one tile's operands; rows that do not exist are not read.
    fn bytes(&self, problem: &Problem) -> f64 {
        let rows_of_x = self.block_m.min(f64::from(problem.m));
        let row = rows_of_x * bytes_of(problem.dtype.x()) + 2.0 * self.block_n * bytes_of(problem.dtype.weights());
        row * f64::from(problem.k)
    }
}

/// Of one number, packed or not.
fn bytes_of(format: Format) -> f64 {
    f64::from(format.bytes()) / f64::from(format.numbers())
}

/// Share of the peak that a tile's inner loop reaches: the more operations an operand serves, the more.
fn efficiency(config: &Config) -> f64 {
    let serves = |rows: u32, cols: u32| f64::from(rows * cols) / f64::from((rows + cols).max(1));
    match config {
        Config::WgmmaTma(config) => {
            let cols = 2.0 * f64::from(config.block_n);
            let schedule = if config.schedule == Schedule::Pingpong { 1.0 } else { 0.95 };
            schedule * cols / (cols + 20.0)
        }
        // A product of few columns takes as long as one of eight more.
        Config::WgmmaStream(config) => f64::from(config.block_m) / f64::from(config.block_m + 8),
        Config::MmaSync(config) => {
            let served = serves(config.block_m / config.warps_m.max(1), 2 * config.block_n / config.warps_n.max(1));
            let staging = if config.staging == Staging::Tma { 1.0 } else { 0.92 };
            staging * served / (served + 20.0)
        }
        Config::MmaDirect(config) => {
            let served = serves(config.block_m, 2 * config.block_n);
            0.5 * served / (served + 20.0)
        }
        // Widening the weights takes as long whatever the tokens.
        Config::WeightOnlyTma(config) => 0.6 * f64::from(config.block_m) / f64::from(config.block_m + 12),
        Config::Simt(config) => {
            let served = serves(config.thread_m, 2 * config.thread_n);
            served / (served + 1.5)
        }
        Config::Elementwise(_)
        | Config::ColumnSum(_)
        | Config::SimtGemm(_)
        | Config::MmaGemm(_)
        | Config::WgmmaGemm(_)
        | Config::Cublaslt(_)
        | Config::Cpu(_) => 1.0,
    }
}

/// Bytes that one block has on their way.
fn in_flight(config: &Config, element: f64) -> f64 {
    let stage = |block_m: u32, block_n: u32, block_k: u32| f64::from((block_m + 2 * block_n) * block_k) * element;
    match config {
        Config::WgmmaStream(config) => {
            f64::from(config.stages) * stage(config.block_m, config.block_n, WgmmaStreamConfig::BLOCK_K)
        }
        Config::WgmmaTma(config) => f64::from(config.stages) * stage(config.block_m, config.block_n, config.block_k),
        Config::MmaSync(config) => {
            f64::from(config.stages.saturating_sub(1)) * stage(config.block_m, config.block_n, config.block_k)
        }
        Config::MmaDirect(config) => f64::from(config.warps * config.loads) * stage(config.block_m, config.block_n, 16),
        Config::WeightOnlyTma(config) => f64::from(config.stages) * stage(0, config.block_n, INT4_GROUP),
        Config::Simt(config) => stage(config.block_m, config.block_n, config.block_k),
        Config::Elementwise(_)
        | Config::ColumnSum(_)
        | Config::SimtGemm(_)
        | Config::MmaGemm(_)
        | Config::WgmmaGemm(_)
        | Config::Cublaslt(_)
        | Config::Cpu(_) => 0.0,
    }
}

/// Blocks of one multiprocessor at a time.
fn resident(problem: &Problem, shape: &LaunchShape, arch: &ArchSpec) -> f64 {
    let threads = shape.threads.max(1);
    let sums = 2 * shape.block_m * shape.block_n / shape.cluster.max(1) / threads;
    let registers = (sums + if problem.dtype == DType::F32 { 100 } else { 50 }).min(255);
    let by_smem = (arch.smem_per_block + RESERVED_BYTES) / (shape.smem_bytes + RESERVED_BYTES);
    f64::from(by_smem.min(arch.threads_per_sm / threads).min(arch.registers_per_sm / (registers * threads)).max(1))
}

/// The peak memory bandwidth that a device class tells, in bytes a second: two transfers a clock over the bus,
/// `…-bus6016-mem3201mhz`.
pub fn bandwidth(class: &str) -> Option<f64> {
    Some(2.0 * part_of_class(class, "mem", "mhz")? * 1e6 * part_of_class(class, "bus", "")? / 8.0)
}

/// The number between `prefix` and `suffix` in one of the parts after the architecture.
fn part_of_class(class: &str, prefix: &str, suffix: &str) -> Option<f64> {
    class.split('-').skip(1).find_map(|part| part.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok())
}

/// Dense operations a clock of one multiprocessor with fp32 sums, of the fastest product of the architecture of this name;
/// NVIDIA's architecture white papers. `None` where none of them says.
pub fn flops_per_clock(arch: &str, dtype: DType) -> Option<f64> {
    let half = match arch {
        "sm_70" | "sm_75" | "sm_86" | "sm_89" | "sm_120" => 1024.0,
        "sm_80" => 2048.0,
        "sm_90a" => 4096.0,
        "sm_100a" => 8192.0,
        _ => return None,
    };
    let has_tf32 = !matches!(arch, "sm_70" | "sm_75");
    match dtype {
        DType::F16 | DType::F16E4m3 | DType::F16Int4 => Some(half),
        DType::Bf16 | DType::Bf16E4m3 | DType::Bf16Int4 => has_tf32.then_some(half),
        DType::E4m3 => matches!(arch, "sm_89" | "sm_90a" | "sm_100a" | "sm_120").then_some(half * 2.0),
        DType::Tf32 => has_tf32.then_some(half / 2.0),
        DType::F32 => Some(if matches!(arch, "sm_70" | "sm_75" | "sm_80") { 128.0 } else { 256.0 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::{Raster, candidates, default_config};
    use crate::problem::{Op, WeightMajor};

    fn h200() -> Chip {
        Chip::of_class("sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz").unwrap()
    }

    #[test]
    fn it_knows_gpus_whose_class_tells_and_nothing_else() {
        assert_eq!((h200().sms, h200().l2_bytes), (132.0, f64::from(60 << 20)));
        for class in ["cpu-x-8", "sm_90a-bench", "sm_1-sm132", ""] {
            assert_eq!(Chip::of_class(class), None, "{class}");
        }
    }

    #[test]
    fn every_candidate_of_every_format_has_a_time() {
        let chip = h200();
        for dtype in DType::ALL {
            for m in [1, 63, 8192] {
                let problem = Problem::forward(dtype, WeightMajor::K, m, 14336, 4096);
                let kernels = candidates(&problem, Target::Gpu(chip.arch)).into_iter();
                for config in kernels.filter(|config| config.family().has_source()) {
                    let us = chip.predict_us(&problem, &config).unwrap();
                    assert!(us.is_finite() && us > OVERHEAD_US, "{config}: {us}");
                }
            }
        }
    }

    /// K 4096, N 14336, M 8192 in tiles of 128x96, under `ncu` on an H200: 2.59, 2.16, 1.71 and 1.50 GB were read. Bands too
    /// wide to stay in L2 it has wrong: 24 tiles of N read 3.32.
    #[test]
    fn walks_are_in_the_order_of_what_they_read() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 8192, 14336, 4096);
        let Config::WgmmaTma(default) = default_config(&problem, h200().arch).unwrap() else { panic!("wgmma_tma") };
        let walks = [(Raster::AlongM, 4), (Raster::AlongN, 8), (Raster::AlongM, 8), (Raster::Resident, 16)];
        let bytes = walks.map(|(raster, raster_group)| {
            let config = families::WgmmaTmaConfig { cluster_m: 1, raster, raster_group, ..default };
            let shape = Config::WgmmaTma(config).launch_shape(&problem).unwrap();
            h200().dram_bytes(&problem, &shape, &Tiles::new(&problem, &shape))
        });
        assert!(bytes.is_sorted_by(|more, less| more > less), "{bytes:?}");
    }

    /// Tiles of 128x192 of 14336 columns are 75 across.
    #[test]
    fn a_last_wave_that_is_cut_up_takes_half_of_one() {
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 2048, 14336, 4096).with_op(Op::Dgated);
        let Config::WgmmaGemm(default) = default_config(&problem, h200().arch).unwrap() else { panic!("wgmma_gemm") };
        let cut = families::WgmmaGemmConfig { cluster_m: 1, ..default };
        assert_eq!((cut.block_m, cut.block_n, cut.tail_n), (128, 192, 64));
        let waves = |config, m| h200().work(&problem.with_m(m), &Config::WgmmaGemm(config)).unwrap();
        // 9 waves and 12 tiles, 7 and 51, of which the parts are too many, 75 in the first.
        assert_eq!([2048, 1664, 128].map(|m| waves(cut, m)), [9.5, 8.0, 1.0]);
        let whole = families::WgmmaGemmConfig { tail_n: 0, ..cut };
        assert_eq!([2048, 1664, 128].map(|m| waves(whole, m)), [10.0, 8.0, 1.0]);
    }

    #[test]
    fn more_tokens_are_more_work_for_blocks_that_walk_over_tiles() {
        let problem = Problem::forward(DType::Tf32, WeightMajor::K, 4096, 4096, 4096);
        let walks = |config: &Config| config.launch_shape(&problem).is_some_and(|shape| shape.per_sm.is_some());
        let all = candidates(&problem, Target::Gpu(h200().arch));
        let walking: Vec<Config> = all.into_iter().filter(walks).collect();
        assert!(walking.iter().any(|config| matches!(config, Config::MmaSync(_))));
        for config in walking {
            let work = |m| h200().work(&problem.with_m(m), &config).unwrap();
            assert!(work(65536) >= 8.0 * work(4096), "{config}");
        }
    }

    #[test]
    fn as_many_blocks_as_a_config_asks_for_count_as_resident() {
        for op in [Op::Forward, Op::Down] {
            let problem = Problem::forward(DType::Bf16, WeightMajor::K, 16, 14336, 4096).with_op(op);
            for config in candidates(&problem, Target::Gpu(h200().arch)) {
                let Some(shape) = config.launch_shape(&problem) else { continue };
                let asked = shape.per_sm.filter(|&asked| asked < u32::MAX).map_or(1.0, f64::from);
                assert!(resident(&problem, &shape, h200().arch) >= asked, "{config}");
            }
        }
    }

    #[test]
    fn a_multiprocessor_holds_no_more_blocks_than_it_has_threads_for() {
        let problem = Problem::forward(DType::F16, WeightMajor::K, 4096, 4096, 4096);
        let shape = families::default_of(Family::Simt, &problem, h200().arch).unwrap().launch_shape(&problem).unwrap();
        let small = LaunchShape { smem_bytes: 0, threads: 128, block_m: 16, block_n: 16, ..shape };
        for (name, blocks) in [("sm_75", 8.0), ("sm_86", 9.0), ("sm_90a", 9.0)] {
            assert_eq!(resident(&problem, &small, arch::by_name(name).unwrap()), blocks, "{name}");
        }
    }

    #[test]
    fn tensor_cores_beat_fma_and_small_blocks_few_tokens() {
        let chip = h200();
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 4096, 14336, 4096);
        let best = |problem: &Problem| {
            let time = |config: &Config| chip.predict_us(problem, config).unwrap();
            let all = candidates(problem, Target::Gpu(chip.arch)).into_iter();
            all.min_by(|a, b| time(a).total_cmp(&time(b))).unwrap()
        };
        assert!(matches!(best(&problem), Config::WgmmaTma(_)));
        assert!(best(&problem.with_m(1)).launch_shape(&problem).unwrap().block_m <= 64);
    }

    #[test]
    fn a_bad_default_is_replaced_and_one_that_may_be_as_good_is_not() {
        let chip = h200();
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 4096, 14336, 4096);
        let default = default_config(&problem, chip.arch).unwrap();
        assert_eq!(chip.better_than(&default, &problem), None);
        let fma = families::default_of(Family::Simt, &problem, chip.arch).unwrap();
        let better = chip.better_than(&fma, &problem).unwrap();
        assert!(better.check(&problem, Target::Gpu(chip.arch)).is_ok() && matches!(better, Config::WgmmaTma(_)));
        let single = Problem { dtype: DType::F32, ..problem };
        let fma = families::default_of(Family::Simt, &single, chip.arch).unwrap();
        assert_eq!(chip.better_than(&fma, &single), None, "not calibrated for fp32");
        let other = Chip::of_class("sm_80-sm108-l2_40m-smem163k-bus5120-mem1215mhz").unwrap();
        let fma = families::default_of(Family::Simt, &problem, other.arch).unwrap();
        assert_eq!(other.better_than(&fma, &problem), None, "not calibrated");
        let cpu = Config::Cpu(families::cpu::default_config(1));
        assert_eq!(chip.better_than(&cpu, &problem), None, "no time, no comparison");
    }
}
