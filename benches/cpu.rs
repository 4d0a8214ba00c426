//! The CPU backend beside two GEMMs of the same crate and an elementwise pass: M 512, K 1024, N 2816, f32.
#![allow(missing_docs, clippy::unwrap_used, reason = "criterion's macros; a bench fails by panicking")]

use criterion::{Criterion, criterion_group, criterion_main};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use std::hint::black_box;
use swiglu_runtime::cpu::{self, CpuPlan};
use swiglu_runtime::{DType, Forward, ForwardSpec, GateOrder, Matrix, WeightLayout, Weights};

const M: usize = 512;
const K: usize = 1024;
const N: usize = 2816;

/// Numbers between -1 and 1 without a pattern that a multiplication could like.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn compare(criterion: &mut Criterion) {
    let (x, gate, up) = (numbers(M * K, 1), numbers(N * K, 2), numbers(N * K, 3));
    let mut z = vec![0.0f32; M * N];
    let mut group = criterion.benchmark_group("forward 512x1024x2816 f32");
    group.sample_size(20);

    let spec = ForwardSpec {
        dtype: DType::F32,
        layout: WeightLayout::SeparateNk,
        gate_order: GateOrder::GateFirst,
        n: N as u32,
        k: K as u32,
        save_preactivations: false,
        static_weights: false,
    };
    let plan = CpuPlan::new(spec, &[]).unwrap();
    group.bench_function("fused", |bencher| {
        bencher.iter(|| {
            let weights = Weights::Separate { gate: Matrix::new(&gate[..], N, K), up: Matrix::new(&up[..], N, K) };
            let z = Matrix::new(&mut z[..], M, N);
            plan.launch(Forward {
                x: Matrix::new(&x[..], M, K),
                weights,
                gate_bias: None,
                up_bias: None,
                z,
                preactivations: None,
            })
            .unwrap();
        });
        black_box(&z);
    });

    let (mut gates, mut ups) = (vec![0.0f32; M * N], vec![0.0f32; M * N]);
    group.bench_function("two GEMMs and a pass", |bencher| {
        let par = Par::rayon(cpu::threads() as usize);
        let weights = |w| MatRef::from_row_major_slice(w, N, K).transpose();
        bencher.iter(|| {
            let x = MatRef::from_row_major_slice(&x[..], M, K);
            matmul(MatMut::from_row_major_slice_mut(&mut gates, M, N), Accum::Replace, x, weights(&gate[..]), 1.0, par);
            matmul(MatMut::from_row_major_slice_mut(&mut ups, M, N), Accum::Replace, x, weights(&up[..]), 1.0, par);
            for ((z, gate), up) in z.iter_mut().zip(&gates).zip(&ups) {
                *z = gate / (1.0 + (-gate).exp()) * up;
            }
        });
        black_box(&z);
    });
    group.finish();
}

criterion_group!(benches, compare);
criterion_main!(benches);
