//! Launches the tuned kernel of one Llama-3.2-1B layer on the first GPU and holds it to the float64 oracle.
//! Links the runtime crate only: `cargo run --release -p swiglu-runtime --example forward`.

use half::bf16;
use std::error::Error;
use swiglu_kernels::{Activation, oracle};
use swiglu_runtime::cudarc::driver::CudaContext;
use swiglu_runtime::{
    DType, Forward, ForwardSpec, GateOrder, Matrix, Options, Runtime, WeightLayout, Weights, library,
};

fn main() -> Result<(), Box<dyn Error>> {
    let (m, n, k) = (128, 8192, 2048);
    library::driver()?; // a sentence instead of a panic where there is no driver
    let context = CudaContext::new(0)?;
    let stream = context.new_stream()?;

    let runtime = Runtime::new(&context, &Options::from_env())?;
    let spec = ForwardSpec {
        dtype: DType::Bf16,
        layout: WeightLayout::SeparateNk,
        gate_order: GateOrder::GateFirst,
        n: n as u32,
        k: k as u32,
        save_preactivations: false,
        static_weights: false,
    };
    let plan = runtime.prepare(&spec)?;
    println!(
        "{}: m = {m} runs `{}` ({:?})",
        runtime.gpu().device.name,
        plan.choice(m as u32).config,
        plan.choice(m as u32).matched
    );

    let x = numbers(m * k, 1.0, 1);
    let gate = numbers(n * k, 1.0 / (k as f32).sqrt(), 2);
    let up = numbers(n * k, 1.0 / (k as f32).sqrt(), 3);
    let (x_gpu, gate_gpu, up_gpu) = (stream.clone_htod(&x)?, stream.clone_htod(&gate)?, stream.clone_htod(&up)?);
    let mut z_gpu = stream.alloc_zeros::<bf16>(m * n)?;
    plan.launch(
        &stream,
        Forward {
            x: Matrix::new(&x_gpu, m, k),
            weights: Weights::Separate { gate: Matrix::new(&gate_gpu, n, k), up: Matrix::new(&up_gpu, n, k) },
            gate_bias: None,
            up_bias: None,
            z: Matrix::new(&mut z_gpu, m, n),
            preactivations: None,
        },
    )?;
    let z = stream.clone_dtoh(&z_gpu)?;

    // Two rows suffice here; the tuner has checked every element.
    let rows = [0, m - 1];
    let wide = |values: &[bf16]| values.iter().map(|value| value.to_f64()).collect::<Vec<f64>>();
    let pick = |values: &[bf16], width: usize| {
        rows.iter().flat_map(|row| wide(&values[row * width..(row + 1) * width])).collect::<Vec<f64>>()
    };
    let operands =
        oracle::Forward { x: &pick(&x, k), gate: &wide(&gate), up: &wide(&up), gate_bias: None, up_bias: None, k };
    let error = oracle::relative_error(pick(&z, n), oracle::forward(Activation::Silu, &operands));
    println!("relative error against float64: {error:.2e}");
    if error > DType::Bf16.tolerance() {
        return Err(format!("the error is over {:.1e}", DType::Bf16.tolerance()).into());
    }
    Ok(())
}

/// Uniform numbers of standard deviation `scale`.
fn numbers(count: usize, scale: f32, seed: u64) -> Vec<bf16> {
    use rand::{RngExt, SeedableRng, rngs::SmallRng};
    let mut rng = SmallRng::seed_from_u64(seed);
    let half_width = scale * 3f32.sqrt();
    (0..count).map(|_| bf16::from_f32(rng.random_range(-half_width..half_width))).collect()
}
