//! One training step of an FFN, forward and backward, on the first GPU, else on the CPU:
//! `cargo run --release -p swiglu-runtime --example ffn`.

use rand::{RngExt, SeedableRng, rngs::SmallRng};
use std::error::Error;
use swiglu_kernels::WeightMajor;
use swiglu_runtime::ffn::{Gradients, Keep};
use swiglu_runtime::{
    Backend, CpuRuntime, DType, FfnBackward, FfnForward, FfnGradients, FfnSpec, FfnWeights, Matrix, Options, Runtime,
};

const M: usize = 64;
const SPEC: FfnSpec = FfnSpec {
    dtype: DType::F32,
    weight_major: WeightMajor::K,
    n: 512,
    k: 256,
    keep: Keep::Preactivations,
    gradients: Gradients::All,
    bias_gradients: true,
};

/// x, Wg, Wu, Wd, bg, bu, bd and dy.
type Operands = [Vec<f32>; 8];

fn main() -> Result<(), Box<dyn Error>> {
    let (n, k) = (SPEC.n as usize, SPEC.k as usize);
    let mut rng = SmallRng::seed_from_u64(1);
    let operands = [M * k, n * k, n * k, n * k, n, n, k, M * k]
        .map(|count| (0..count).map(|_| rng.random_range(-0.1..0.1)).collect::<Vec<f32>>());
    let (place, y, dx) = match Backend::detect(&Options::from_env()) {
        Backend::Gpu(runtime) => {
            let (y, dx) = on_gpu(&runtime, &operands)?;
            (runtime.gpu().device.name.clone(), y, dx)
        }
        Backend::Cpu(runtime, why) => {
            let (y, dx) = on_cpu(&runtime, &operands)?;
            (format!("the CPU ({why})"), y, dx)
        }
    };
    let norm = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    println!("on {place}: |y| = {:.4}, |dx| = {:.6}", norm(&y), norm(&dx));
    Ok(())
}

/// Operand `index` as a matrix of slices `of`.
fn weights<S: Copy>(of: [S; 8]) -> FfnWeights<S> {
    let [gate, down] = SPEC.weight_shapes();
    FfnWeights {
        gate: Matrix::new(of[1], gate.0, gate.1),
        up: Matrix::new(of[2], gate.0, gate.1),
        down: Matrix::new(of[3], down.0, down.1),
        gate_bias: Some(of[4]),
        up_bias: Some(of[5]),
        down_bias: Some(of[6]),
    }
}

fn gradients<S>([gate, up, down, gate_bias, up_bias, down_bias]: [S; 6]) -> FfnGradients<S> {
    let [shape, down_shape] = SPEC.weight_shapes();
    FfnGradients {
        gate: Matrix::new(gate, shape.0, shape.1),
        up: Matrix::new(up, shape.0, shape.1),
        down: Matrix::new(down, down_shape.0, down_shape.1),
        biases: Some([gate_bias, up_bias, down_bias]),
    }
}

/// Elements of what is saved, and of the two workspaces.
fn buffers() -> [usize; 3] {
    let m = M as u32;
    [SPEC.saved_bytes(m), SPEC.forward_workspace_bytes(m), SPEC.backward_workspace_bytes(m)]
        .map(|bytes| bytes as usize / size_of::<f32>())
}

fn on_gpu(runtime: &Runtime, operands: &Operands) -> Result<(Vec<f32>, Vec<f32>), Box<dyn Error>> {
    let k = SPEC.k as usize;
    let plan = runtime.prepare_ffn(&SPEC)?;
    let stream = runtime.gpu().context.new_stream()?;
    let mut on_device = Vec::new();
    for operand in operands {
        on_device.push(stream.clone_htod(operand)?);
    }
    let of: [_; 8] = std::array::from_fn(|index| &on_device[index]);
    let zeros = |count: usize| stream.alloc_zeros::<f32>(count);
    let [saved, forward_workspace, backward_workspace] = buffers();
    let (mut saved, mut workspace) = (zeros(saved)?, zeros(forward_workspace)?);
    let (mut y, mut dx) = (zeros(M * k)?, zeros(M * k)?);
    plan.forward(
        &stream,
        FfnForward {
            x: Matrix::new(of[0], M, k),
            weights: weights(of),
            y: Matrix::new(&mut y, M, k),
            saved: Some(&mut saved),
            workspace: &mut workspace,
        },
    )?;
    let mut workspace = zeros(backward_workspace)?;
    let mut grads = Vec::new();
    for operand in &operands[1..7] {
        grads.push(zeros(operand.len())?);
    }
    let [gate, up, down, gate_bias, up_bias, down_bias] = &mut grads[..] else { return Err("six gradients".into()) };
    plan.backward(
        &stream,
        FfnBackward {
            x: Matrix::new(of[0], M, k),
            weights: weights(of),
            dy: Matrix::new(of[7], M, k),
            dx: Matrix::new(&mut dx, M, k),
            gradients: Some(gradients([gate, up, down, gate_bias, up_bias, down_bias])),
            saved: Some(&mut saved),
            workspace: Some(&mut workspace),
        },
    )?;
    Ok((stream.clone_dtoh(&y)?, stream.clone_dtoh(&dx)?))
}

fn on_cpu(runtime: &CpuRuntime, operands: &Operands) -> Result<(Vec<f32>, Vec<f32>), Box<dyn Error>> {
    let k = SPEC.k as usize;
    let plan = runtime.prepare_ffn(&SPEC)?;
    let of = operands.each_ref().map(|operand| &operand[..]);
    let [mut saved, mut workspace, mut backward_workspace] = buffers().map(|count| vec![0.0f32; count]);
    let (mut y, mut dx) = (vec![0.0; M * k], vec![0.0; M * k]);
    plan.forward(FfnForward {
        x: Matrix::new(of[0], M, k),
        weights: weights(of),
        y: Matrix::new(&mut y[..], M, k),
        saved: Some(&mut saved[..]),
        workspace: &mut workspace[..],
    })?;
    let mut grads: [Vec<f32>; 6] = std::array::from_fn(|index| vec![0.0; operands[index + 1].len()]);
    plan.backward(FfnBackward {
        x: Matrix::new(of[0], M, k),
        weights: weights(of),
        dy: Matrix::new(of[7], M, k),
        dx: Matrix::new(&mut dx[..], M, k),
        gradients: Some(gradients(grads.each_mut().map(|grad| &mut grad[..]))),
        saved: Some(&mut saved[..]),
        workspace: Some(&mut backward_workspace[..]),
    })?;
    Ok((y, dx))
}
