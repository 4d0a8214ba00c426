//! Launches of the FFN's steps, and of all that a backward takes.

use crate::call::{matrices, tokens};
use crate::error::{Failure, guarded};
use crate::plans::StepKey;
use crate::{gpu, number_format, plan_of, plans, size, unknown};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;
use swiglu_kernels::{Op, Problem, WeightMajor};
use swiglu_runtime::{DType, RawMatrix, RawStep, WeightLayout};

/// [`step`] as Python sees it.
static OWN_STEP: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

/// Tells [`Steps`] which step is our own.
pub(crate) fn add_to(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(prepare_step, module)?)?;
    module.add_function(wrap_pyfunction!(step, module)?)?;
    module.add_function(wrap_pyfunction!(backward, module)?)?;
    OWN_STEP.get_or_try_init(module.py(), || module.getattr("step").map(Bound::unbind)).map(|_| ())
}

/// Compiles and loads what [`step`] launches for these sizes on GPU `device`.
#[pyfunction]
fn prepare_step(py: Python<'_>, device: i32, dtype: &str, op: &str, major: &str, n: u64, k: u64) -> PyResult<()> {
    let key = step_key(device, number_format(dtype)?, op.parse().map_err(unknown("op"))?, major_of(major)?, n, k)?;
    py.detach(|| guarded(|| plans::get_or_prepare(key))).map(|_| ())
}

/// Launches a step of the FFN on `m` tokens, through a plan that is kept as that of the forward is. `left`, `right`, `saved`
/// and `out` are what `RawStep` names so: of each matrix an address and a row stride in turn; what the op has none of is left
/// out.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
fn step(
    py: Python<'_>,
    device: i32,
    dtype: &str,
    stream: u64,
    m: u64,
    op: &str,
    major: &str,
    n: u64,
    k: u64,
    left: &Bound<'_, PyTuple>,
    right: &Bound<'_, PyTuple>,
    saved: &Bound<'_, PyTuple>,
    out: &Bound<'_, PyTuple>,
    bias: u64,
) -> PyResult<()> {
    let args = RawStep {
        m: 0,
        left: matrices("left", left)?,
        right: matrices("right", right)?,
        saved: matrices("saved", saved)?,
        out: matrices("out", out)?,
        bias,
    };
    let steps = Steps { py, instead: None, device, dtype: number_format(dtype)?, stream, m };
    steps.launch(op.parse().map_err(unknown("op"))?, major_of(major)?, n, k, args)
}

/// All launches of a backward, of the gradients that are given. `step` is our own, or what stands in for it; `layer` begins with
/// device, dtype, stream, m, n, k and layout, `of_down` with the rows of a down projection and the step's word for its order.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
fn backward(
    py: Python<'_>,
    step: &Bound<'_, PyAny>,
    layer: &Bound<'_, PyTuple>,
    of_dy: One,
    of_x: One,
    of_weights: Two,
    of_down: Option<(u64, String, One)>,
    of_saved: Two,
    of_grads: Two,
    of_dx: Option<One>,
    of_d_weights: Option<Two>,
    of_d_down: Option<One>,
    of_new_z: Option<One>,
    of_z: Option<One>,
) -> PyResult<()> {
    let (device, dtype, stream, m) = layer.get_slice(0, 4).extract::<(i32, String, u64, u64)>()?;
    let (n, k, layout) = layer.get_slice(4, 7).extract::<(u64, u64, String)>()?;
    let layout: WeightLayout = layout.parse().map_err(unknown("layout"))?;
    let of_down = match of_down {
        None => None,
        Some((rows, major, group)) => Some(Down { rows, major: major_of(&major)?, group }),
    };
    let steps = Steps::new(py, step, device, number_format(&dtype)?, stream, m);
    let major = layout.major();
    let backward = Backward { major, n, k, of_dy, of_x, of_weights, of_down, of_saved, of_grads };
    backward.gated(&steps, of_new_z)?;
    match (of_d_down, of_new_z.or(of_z)) {
        (None, _) => {}
        (Some(d_down), Some(z)) => backward.down_weight_grad(&steps, z, d_down)?,
        (Some(_), None) => return Err(Failure::argument("of_d_down", "needs z: `of_new_z` or `of_z`").into()),
    }
    if let Some(dx) = of_dx {
        backward.input_grad(&steps, dx)?;
    }
    if let Some(d_weights) = of_d_weights {
        backward.weight_grad(&steps, d_weights)?;
    }
    Ok(())
}

fn step_key(device: i32, dtype: DType, op: Op, major: WeightMajor, n: u64, k: u64) -> Result<StepKey, Failure> {
    let gpu = u32::try_from(device).map_err(|_| Failure::argument("device", "is the CPU; a step runs on a GPU"))?;
    let problem = Problem::forward(dtype, major, 1, size("n", n)?, size("k", k)?).with_op(op);
    Ok(StepKey { gpu, problem })
}

fn major_of(word: &str) -> PyResult<WeightMajor> {
    Ok(word.parse().map_err(unknown("major"))?)
}

/// Launches on `m` tokens, one after another.
pub(crate) struct Steps<'py> {
    py: Python<'py>,
    /// What launches instead, called as [`step`] is: tests have no GPU, or want to see.
    instead: Option<Bound<'py, PyAny>>,
    device: i32,
    dtype: DType,
    stream: u64,
    m: u64,
}

impl<'py> Steps<'py> {
    pub(crate) fn new(
        py: Python<'py>,
        step: &Bound<'py, PyAny>,
        device: i32,
        dtype: DType,
        stream: u64,
        m: u64,
    ) -> Self {
        let is_own = OWN_STEP.get(py).is_some_and(|own| step.is(own));
        let instead = (!is_own).then(|| step.clone());
        Self { py, instead, device, dtype, stream, m }
    }

    /// `args` but for M.
    pub(crate) fn launch(&self, op: Op, major: WeightMajor, n: u64, k: u64, args: RawStep) -> PyResult<()> {
        let &Self { py, device, dtype, stream, m, .. } = self;
        if let Some(step) = &self.instead {
            let groups = [&args.left[..], &args.right, &args.saved, &args.out].map(|group| tuple(py, group));
            let [left, right, saved, out] = groups;
            let given = (device, dtype.name(), stream, m, op.name(), major.name(), n, k).into_pyobject(py)?;
            let operands = (left?, right?, saved?, out?, args.bias).into_pyobject(py)?;
            let all = given.as_sequence().concat(operands.as_sequence())?;
            return step.call1(all.to_tuple()?).map(|_| ());
        }
        let key = step_key(device, dtype, op, major, n, k)?;
        let args = RawStep { m: tokens(m)?, ..args };
        let (plan, _) = plan_of(py, key, stream)?;
        guarded(|| gpu::launch_step(&plan, stream, &args))
    }
}

/// As [`step`] takes them: the address and row stride of each matrix that is there.
fn tuple<'py>(py: Python<'py>, group: &[RawMatrix]) -> PyResult<Bound<'py, PyTuple>> {
    let there = group.iter().filter(|matrix| matrix.address != 0);
    let numbers: Vec<i128> = there.flat_map(|matrix| [i128::from(matrix.address), i128::from(matrix.stride)]).collect();
    PyTuple::new(py, numbers)
}

/// A matrix's address and row stride.
pub(crate) type One = (u64, i64);
/// Those of two.
pub(crate) type Two = (u64, i64, u64, i64);

/// A down projection.
pub(crate) struct Down {
    pub(crate) rows: u64,
    pub(crate) major: WeightMajor,
    pub(crate) group: One,
}

/// What a backward reads; it begins with [`Backward::gated`], the others come in any order.
///
/// The pre-activations are `of_saved`, their gradients are written `of_grads`, which may be the same. Gradients of weights lie
/// in memory as their weights do.
pub(crate) struct Backward {
    pub(crate) major: WeightMajor,
    pub(crate) n: u64,
    pub(crate) k: u64,
    pub(crate) of_dy: One,
    pub(crate) of_x: One,
    pub(crate) of_weights: Two,
    pub(crate) of_down: Option<Down>,
    pub(crate) of_saved: Two,
    pub(crate) of_grads: Two,
}

impl Backward {
    /// The gradients of the pre-activations; z is computed again if `new_z` says where.
    pub(crate) fn gated(&self, steps: &Steps<'_>, new_z: Option<One>) -> PyResult<()> {
        let [gate, up] = two(self.of_grads);
        let out = [gate, up, new_z.map_or_else(RawMatrix::default, matrix)];
        let args = RawStep { left: one(self.of_dy), saved: two(self.of_saved), out, ..RawStep::default() };
        match &self.of_down {
            // Without weights either order is the op's.
            None => steps.launch(Op::GateBackward, WeightMajor::K, self.n, self.n, args),
            Some(down) => {
                let args = RawStep { right: one(down.group), ..args };
                steps.launch(Op::Dgated, down.major, self.n, down.rows, args)
            }
        }
    }

    pub(crate) fn input_grad(&self, steps: &Steps<'_>, dx: One) -> PyResult<()> {
        let (left, right) = (two(self.of_grads), two(self.of_weights));
        let args = RawStep { left, right, out: outputs(one(dx)), ..RawStep::default() };
        steps.launch(Op::InputGrad, self.major, self.n, self.k, args)
    }

    pub(crate) fn weight_grad(&self, steps: &Steps<'_>, d_weights: Two) -> PyResult<()> {
        let (grads, x) = (two(self.of_grads), one(self.of_x));
        let (left, right) = if self.major == WeightMajor::K { (grads, x) } else { (x, grads) };
        let args = RawStep { left, right, out: outputs(two(d_weights)), ..RawStep::default() };
        steps.launch(Op::WeightGrad, self.major, self.n, self.k, args)
    }

    pub(crate) fn down_weight_grad(&self, steps: &Steps<'_>, z: One, d_down: One) -> PyResult<()> {
        let missing = || Failure::argument("of_down", "is missing where its gradient is asked for");
        let down = self.of_down.as_ref().ok_or_else(missing)?;
        let (dy, z) = (one(self.of_dy), one(z));
        let (left, right) = if down.major == WeightMajor::K { (dy, z) } else { (z, dy) };
        let args = RawStep { left, right, out: outputs(one(d_down)), ..RawStep::default() };
        steps.launch(Op::DownWeightGrad, down.major, self.n, down.rows, args)
    }
}

fn matrix((address, stride): One) -> RawMatrix {
    RawMatrix { address, stride }
}

pub(crate) fn one(group: One) -> [RawMatrix; 2] {
    [matrix(group), RawMatrix::default()]
}

fn two((first, first_stride, second, second_stride): Two) -> [RawMatrix; 2] {
    [matrix((first, first_stride)), matrix((second, second_stride))]
}

pub(crate) fn outputs([first, second]: [RawMatrix; 2]) -> [RawMatrix; 3] {
    [first, second, RawMatrix::default()]
}
