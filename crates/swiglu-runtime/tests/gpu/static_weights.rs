//! Weights that are read before the launch ahead has ended.

use super::{Case, gpu, spec};
use half::bf16;
use rand::seq::IndexedRandom;
use rand::{SeedableRng, rngs::SmallRng};
use rand_distr::{Distribution, StandardNormal};
use swiglu_kernels::families::{Config, Target, candidates};
use swiglu_runtime::cudarc::driver::DevicePtr;
use swiglu_runtime::{DType, ForwardSpec, RawForward, WeightLayout};

/// Each launch reads what the one before wrote, while its weights are on their way already.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn static_weights_are_read_ahead_and_x_is_waited_for() {
    let gpu = gpu();
    let (stream, arch) = (&gpu.stream, gpu.runtime.gpu().arch);
    let mut rng = SmallRng::seed_from_u64(21);
    let (m, n) = (4_u32, 4096_u32);
    let spec = ForwardSpec { static_weights: true, ..spec(DType::Bf16, WeightLayout::SeparateNk, n, n) };
    let mut normal = |rows: u32, scale: f32| -> Vec<bf16> {
        let of = |_| bf16::from_f32(scale * Distribution::<f32>::sample(&StandardNormal, &mut rng));
        (0..rows * n).map(of).collect()
    };
    let tokens = normal(m, 1.0);
    // With a gate near 8 whatever x is, z is near 8 times a sum of 4096 products: as large as x, launch after launch.
    let [gate, up] = [0.1 / 64.0, 0.125 / 64.0].map(|scale| stream.clone_htod(&normal(n, scale)).unwrap());
    let gate_bias = stream.clone_htod(&vec![bf16::from_f32(8.0); n as usize]).unwrap();
    stream.synchronize().unwrap();
    let all = candidates(&spec.problem(m), Target::Gpu(arch)).into_iter();
    let for_few_tokens = |config: &Config| match config {
        Config::WgmmaStream(_) => true,
        Config::WgmmaTma(tma) => tma.consumers == 1,
        _ => false,
    };
    let tiles: Vec<Config> = all.filter(for_few_tokens).collect();
    let mut rng = SmallRng::seed_from_u64(22);
    for config in tiles.sample(&mut rng, 24) {
        let plan = gpu.runtime.prepare_config(&spec, *config).unwrap();
        let chain = |apart: bool| {
            let buffers = [stream.clone_htod(&tokens).unwrap(), stream.clone_htod(&tokens).unwrap()];
            for step in 0..9 {
                let (from, to) = (&buffers[step % 2], &buffers[(step + 1) % 2]);
                let raw = RawForward {
                    m,
                    x: from.device_ptr(stream).0,
                    x_stride: i64::from(n),
                    gate: gate.device_ptr(stream).0,
                    gate_stride: i64::from(n),
                    up: up.device_ptr(stream).0,
                    up_stride: i64::from(n),
                    gate_bias: gate_bias.device_ptr(stream).0,
                    z: to.device_ptr(stream).0,
                    z_stride: i64::from(n),
                    ..RawForward::default()
                };
                // SAFETY: the slices hold the operands and live until the last output is read back below.
                unsafe { plan.launch_raw(stream.cu_stream(), &raw) }.unwrap();
                if apart {
                    stream.synchronize().unwrap();
                }
            }
            let found = stream.clone_dtoh(&buffers[1]).unwrap();
            let rms = found.iter().map(|value| value.to_f32().powi(2)).sum::<f32>() / found.len() as f32;
            assert!((0.1..10.0).contains(&rms), "{rms}");
            found.into_iter().map(bf16::to_bits).collect::<Vec<u16>>()
        };
        assert_eq!(chain(false), chain(true), "{config}");
    }
    let case_spec = ForwardSpec { n: 200, k: 776, ..spec };
    for config in tiles.sample(&mut rng, 24) {
        let plan = gpu.runtime.prepare_config(&case_spec, *config).unwrap();
        for m in [1, 17, 64] {
            Case::<bf16>::new(case_spec, m, 8, m == 17, 14).check(&gpu, &plan, &config.to_string());
        }
    }
}
