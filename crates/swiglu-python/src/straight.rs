//! Calls of plain tensors in one go: read, checked, allocated for and launched without Python in between.
//!
//! Whatever is out of the ordinary is answered with None: Python's general way then names the error or copies.

use crate::call::Call;
use crate::dlpack::{Exchange, View};
use crate::error::guarded;
use crate::lie::{Lie, down_matrix, is_alike, is_vector, rows, weights, with_last};
use crate::plans::Device;
use crate::steps::{Backward, Down, Steps, Two, one, outputs};
use crate::{forward_key, gpu, plan_of, run};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};
use swiglu_kernels::{Op, WeightMajor};
use swiglu_runtime::{DType, RawForward, RawStep, WeightLayout};

/// Torch as native code sees it: how its tensors are read and made.
#[pyclass(frozen, module = "swiglu._native")]
pub(crate) struct Torch {
    exchange: Exchange,
    empty_cpu: Py<PyAny>,
    empty_cuda: Py<PyAny>,
    formats: [(DType, Py<PyAny>); 3],
    word_of_f32: Py<PyAny>,
    note_new: Py<PyAny>,
}

/// How the operands of one forward lie: what its backward by addresses relies on.
#[pyclass(frozen, module = "swiglu._native")]
pub(crate) struct Layer {
    shape: Shape,
    x: Lie,
    gate: Lie,
    up: Lie,
    down: Option<Lie>,
}

#[pymethods]
impl Layer {
    /// CUDA's number of the GPU; -1: the CPU.
    #[getter]
    fn device(&self) -> i32 {
        self.shape.device
    }

    /// The order of both weights in memory, in the runtime's words.
    #[getter]
    fn layout(&self) -> &'static str {
        self.shape.layout.name()
    }
}

impl Layer {
    /// Its backward, whose gradients of the pre-activations take their place, wherever they are; None if anything has been
    /// exchanged since, or does not fit.
    fn backward(&self, taken: &Taken<View>) -> Option<Backward> {
        let Taken { dy, x, gate, up, down, kept } = taken;
        let Shape { m, n, k, layout, x_stride, gate_stride, up_stride, .. } = self.shape;
        if !self.is_of(taken) || kept.as_ref().is_some_and(|kept| !is_vector(&kept.lie, 2 * m * n, &self.x)) {
            return None;
        }
        let of_down = match down {
            None => None,
            Some(down) => {
                let (out, layout, stride) = down_matrix(&down.lie, n, &self.x)?;
                Some(Down { rows: out.unsigned_abs(), major: layout.major(), group: (down.address, stride) })
            }
        };
        let columns = of_down.as_ref().map_or(n, |down| down.rows.cast_signed());
        let (tokens, cols, dy_stride) = rows(&dy.lie)?;
        if (tokens, cols) != (m, columns) || !is_alike(&dy.lie, &self.x) {
            return None;
        }
        let of_saved = self.shape.halves(kept.as_ref().map_or(0, |kept| kept.address));
        Some(Backward {
            major: layout.major(),
            n: n.unsigned_abs(),
            k: k.unsigned_abs(),
            of_dy: (dy.address, dy_stride),
            of_x: (x.address, x_stride),
            of_weights: (gate.address, gate_stride, up.address, up_stride),
            of_down,
            of_saved,
            of_grads: of_saved,
        })
    }

    /// Whether these lie as the forward's operands did.
    fn is_of(&self, taken: &Taken<View>) -> bool {
        taken.x.lie == self.x
            && taken.gate.lie == self.gate
            && taken.up.lie == self.up
            && taken.down.as_ref().map(|down| &down.lie) == self.down.as_ref()
    }
}

/// What a native call takes beside addresses. Strides are of rows, in elements.
#[derive(Debug, Clone, Copy)]
struct Shape {
    device: i32,
    /// fp32 as torch's matmul precision had it.
    dtype: DType,
    m: i64,
    n: i64,
    k: i64,
    layout: WeightLayout,
    x_stride: i64,
    gate_stride: i64,
    up_stride: i64,
}

impl Shape {
    /// Both halves of what is kept, or of its gradients: addresses and row strides.
    fn halves(&self, first: u64) -> Two {
        let half = u64::from(self.dtype.bytes()) * (self.m * self.n).unsigned_abs();
        (first, self.n, first + half, self.n)
    }

    /// Whether the columns of both weights are adjacent.
    fn is_kn(&self) -> bool {
        self.layout == WeightLayout::SeparateKn
    }
}

/// The operands of a forward, and the down projection that follows it, if any.
struct Operands<T> {
    x: T,
    gate: T,
    up: T,
    gate_bias: Option<T>,
    up_bias: Option<T>,
    down: Option<T>,
    down_bias: Option<T>,
}

/// What a backward takes: operands of the forward, and the pre-activations if they were kept.
struct Taken<T> {
    dy: T,
    x: T,
    gate: T,
    up: T,
    down: Option<T>,
    kept: Option<T>,
}

/// What a forward leaves.
struct Done<'py> {
    z: Made<'py>,
    /// The pre-activations, if they are kept.
    kept: Option<Made<'py>>,
    layer: Layer,
}

/// The same as Python has it.
type Recorded<'py> = (Object<'py>, Option<Object<'py>>, Layer);

type Object<'py> = Bound<'py, PyAny>;

/// A tensor that is written, and its address.
type Made<'py> = (Object<'py>, u64);

#[pymethods]
impl Torch {
    /// Of the capsule `torch.Tensor.__dlpack_c_exchange_api__`, the types that are plain, `Tensor.is_neg`, what allocates by
    /// shape, strides and format, the formats bf16, fp16 and fp32, and the word of fp32 on a GPU by its number, and
    /// what is told of a plan that a call had to prepare: what `_native.prepare` takes but for static weights, and M.
    #[new]
    #[allow(clippy::too_many_arguments, reason = "each is another thing of torch's")]
    fn new(
        capsule: &Bound<'_, PyAny>,
        tensor: Py<PyType>,
        parameter: Py<PyType>,
        is_negated: Py<PyAny>,
        empty_cpu: Py<PyAny>,
        empty_cuda: Py<PyAny>,
        bf16: Py<PyAny>,
        f16: Py<PyAny>,
        f32: Py<PyAny>,
        word_of_f32: Py<PyAny>,
        note_new: Py<PyAny>,
    ) -> PyResult<Self> {
        let formats = [(DType::Bf16, bf16), (DType::F16, f16), (DType::F32, f32)];
        let exchange = Exchange::new(capsule, tensor, parameter, is_negated)?;
        Ok(Self { exchange, empty_cpu, empty_cuda, formats, word_of_f32, note_new })
    }

    /// Whether each is None or a tensor on a CPU or GPU with memory of its own: no subclass, wrapper or lazy negation.
    #[pyo3(signature = (*tensors))]
    fn are_plain(&self, tensors: &Bound<'_, PyTuple>) -> bool {
        tensors.iter().all(|tensor| {
            tensor.is_none() || (self.exchange.is_plain(&tensor) && self.exchange.read(&tensor).is_some())
        })
    }

    /// `z`, launched. What a down projection takes is only checked.
    #[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        x: &Object<'_>,
        gate: &Object<'_>,
        up: &Object<'_>,
        down: Option<&Object<'_>>,
        gate_bias: Option<&Object<'_>>,
        up_bias: Option<&Object<'_>>,
        down_bias: Option<&Object<'_>>,
        static_weights: bool,
    ) -> PyResult<Option<Object<'py>>> {
        let operands = Operands { x, gate, up, gate_bias, up_bias, down, down_bias };
        Ok(self.launch(py, &operands, false, static_weights)?.map(|done| done.z.0))
    }

    /// `(z, kept, layer)`, launched: both pre-activations in one tensor, if `keep`, and how the operands lie.
    #[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
    fn forward_recorded<'py>(
        &self,
        py: Python<'py>,
        x: &Object<'_>,
        gate: &Object<'_>,
        up: &Object<'_>,
        down: Option<&Object<'_>>,
        gate_bias: Option<&Object<'_>>,
        up_bias: Option<&Object<'_>>,
        down_bias: Option<&Object<'_>>,
        keep: bool,
    ) -> PyResult<Option<Recorded<'py>>> {
        let operands = Operands { x, gate, up, gate_bias, up_bias, down, down_bias };
        let done = self.launch(py, &operands, keep, false)?;
        Ok(done.map(|Done { z, kept, layer }| (z.0, kept.map(|kept| kept.0), layer)))
    }

    /// `y = z @ down.T + bias`, launched by `step`, which is `_native.step` or stands in for it.
    fn down<'py>(
        &self,
        py: Python<'py>,
        step: &Object<'py>,
        z: &Object<'py>,
        down: &Object<'py>,
        bias: Option<&Object<'py>>,
        static_weights: bool,
    ) -> PyResult<Option<Object<'py>>> {
        let (Some(z), Some(down), Some(bias)) = (self.plain(z), self.plain(down), self.plain_if_any(bias)) else {
            return Ok(None);
        };
        let Some((m, n, z_stride)) = rows(&z.lie) else { return Ok(None) };
        let Some((out, layout, stride)) = down_matrix(&down.lie, n, &z.lie) else { return Ok(None) };
        let (Some(dtype), true) = (self.format(py, &z.lie)?, fits_bias(bias.as_ref(), out, &z.lie)) else {
            return Ok(None);
        };
        let Some(stream) = self.exchange.stream(py, z.lie.device) else { return Ok(None) };
        let Some((y, address)) = self.allocate(py, &z.lie, &with_last(&z.lie, out), false)? else { return Ok(None) };
        let args = RawStep {
            left: one((z.address, z_stride)),
            right: one((down.address, stride)),
            out: outputs(one((address, out))),
            bias: bias.map_or(0, |bias| bias.address),
            ..RawStep::default()
        };
        let steps = Steps::new(py, step, z.lie.device, dtype, stream, m.unsigned_abs());
        let op = if static_weights { Op::DownStatic } else { Op::Down };
        steps.launch(op, layout.major(), n.unsigned_abs(), out.unsigned_abs(), args)?;
        Ok(Some(y))
    }

    /// An unwritten tensor of the format and on the device of `like`, of its shape unless `shape` is another; rows adjacent, or
    /// columns if `transposed`. None of what is not plain, and on a GPU that is not the current one.
    #[pyo3(signature = (like, shape = None, transposed = false))]
    fn empty<'py>(
        &self,
        py: Python<'py>,
        like: &Object<'py>,
        shape: Option<Vec<i64>>,
        transposed: bool,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(view) = self.plain(like) else { return Ok(None) };
        let shape = shape.as_deref().unwrap_or_else(|| view.lie.shape());
        Ok(self.allocate(py, &view.lie, shape, transposed)?.map(|(tensor, _)| tensor))
    }

    /// The backward of what `layer` is of, if nothing has been exchanged since, launched by `step`, which is `_native.step` or
    /// stands in for it: dx, d_gate, d_up and d_down, where they are needed.
    ///
    /// Pre-activations that were not kept are computed again, which takes the biases. `d_weights` is for the gradients of both
    /// weights, else they are made here.
    #[allow(clippy::too_many_arguments, reason = "one flat call costs Python less than any structure")]
    fn backward<'py>(
        &self,
        py: Python<'py>,
        step: &Object<'py>,
        layer: &Layer,
        dy: &Object<'py>,
        x: &Object<'py>,
        gate: &Object<'py>,
        up: &Object<'py>,
        down: Option<&Object<'py>>,
        gate_bias: Option<&Object<'py>>,
        up_bias: Option<&Object<'py>>,
        kept: Option<&Object<'py>>,
        d_weights: Option<(Object<'py>, Object<'py>)>,
        in_place: bool,
        need_x: bool,
        need_weights: bool,
        need_down: bool,
    ) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let taken = Taken { dy, x, gate, up, down, kept };
        let Some(taken) = self.read_taken(&taken) else { return Ok(None) };
        let Some(backward) = layer.backward(&taken) else { return Ok(None) };
        let Shape { device, dtype, m, .. } = layer.shape;
        let Some(stream) = self.exchange.stream(py, device) else { return Ok(None) };
        let again = if kept.is_none() {
            let operands = Operands { x, gate, up, gate_bias, up_bias, down: None, down_bias: None };
            let Some(done) = self.launch(py, &operands, true, false)? else { return Ok(None) };
            Some(done)
        } else {
            None
        };

        let in_place = in_place || again.is_some();
        let needs = Needs { in_place, x: need_x, weights: need_weights, down: need_down && taken.down.is_some() };
        let gradients = Gradients { torch: self, py, layer, needs };
        let Some(outputs) = gradients.before_launch(again, d_weights)? else { return Ok(None) };
        let steps = Steps::new(py, step, device, dtype, stream, m.unsigned_abs());
        gradients.launch(&steps, backward, outputs).map(Some)
    }
}

impl Torch {
    fn plain(&self, object: &Object<'_>) -> Option<View> {
        if self.exchange.is_plain(object) { self.exchange.read(object) } else { None }
    }

    /// None where it is not plain; what is not there is.
    fn plain_if_any(&self, object: Option<&Object<'_>>) -> Option<Option<View>> {
        object.map_or(Some(None), |object| self.plain(object).map(Some))
    }

    /// The runtime's format, of fp32 on a GPU by torch's matmul precision.
    fn format(&self, py: Python<'_>, lie: &Lie) -> PyResult<Option<DType>> {
        if lie.dtype != Some(DType::F32) || lie.device < 0 {
            return Ok(lie.dtype);
        }
        let word = self.word_of_f32.bind(py).call1((lie.device,))?;
        Ok(word.extract::<String>()?.parse().ok())
    }

    /// As [`Torch::empty`], with its address.
    fn allocate<'py>(
        &self,
        py: Python<'py>,
        like: &Lie,
        shape: &[i64],
        transposed: bool,
    ) -> PyResult<Option<Made<'py>>> {
        let format = self.formats.iter().find(|(dtype, _)| Some(*dtype) == like.dtype);
        let Some((_, format)) = format else { return Ok(None) };
        let allocator = match u32::try_from(like.device) {
            Err(_) => &self.empty_cpu,
            Ok(gpu) if guarded(|| gpu::is_current(gpu))? => &self.empty_cuda,
            Ok(_) => return Ok(None),
        };
        let (mut strides, mut next) = (shape.to_vec(), 1_i64);
        let mut fill = |(stride, &size): (&mut i64, &i64)| {
            *stride = next;
            next = next.saturating_mul(size.max(1));
        };
        if transposed {
            strides.iter_mut().zip(shape).for_each(&mut fill);
        } else {
            strides.iter_mut().zip(shape).rev().for_each(&mut fill);
        }
        let (shape, strides) = (PyTuple::new(py, shape)?, PyTuple::new(py, strides)?);
        let tensor = allocator.bind(py).call1((shape, strides, format))?;
        // Torch's device of this thread may be another than CUDA's.
        let view = self.exchange.read(&tensor).filter(|view| view.lie.device == like.device);
        Ok(view.map(|view| (tensor, view.address)))
    }

    fn launch<'py>(
        &self,
        py: Python<'py>,
        operands: &Operands<&Object<'_>>,
        keep: bool,
        static_weights: bool,
    ) -> PyResult<Option<Done<'py>>> {
        let Some(views) = self.read_all(operands) else { return Ok(None) };
        let Some(shape) = shape_of(&views) else { return Ok(None) };
        let Some(dtype) = self.format(py, &views.x.lie)? else { return Ok(None) };
        let shape = Shape { dtype, ..shape };
        let Shape { device, m, n, k, layout, x_stride, gate_stride, up_stride, .. } = shape;
        let place = u32::try_from(device).map_or(Device::Cpu, Device::Gpu);
        let (Ok(wide), Ok(deep)) = (u32::try_from(n), u32::try_from(k)) else { return Ok(None) };
        let key = forward_key(place, dtype, layout.major(), wide, deep, keep, static_weights);
        let Some(stream) = self.exchange.stream(py, device) else { return Ok(None) };
        let (plan, is_new) = plan_of(py, key, stream)?;
        // What serves static weights is tuned for few tokens only; that is nothing to warn about.
        if is_new && !static_weights {
            let of_plan = (device, dtype.name(), layout.name(), n, k, keep, m);
            self.note_new.bind(py).call1(of_plan)?;
        }
        let like = &views.x.lie;
        let Some(z) = self.allocate(py, like, &with_last(like, n), false)? else { return Ok(None) };
        let (kept, (saved_gate, saved_gate_stride, saved_up, saved_up_stride)) = if keep {
            let Some(kept) = self.allocate(py, like, &[2 * m * n], false)? else { return Ok(None) };
            let halves = shape.halves(kept.1);
            (Some(kept), halves)
        } else {
            (None, (0, n, 0, n))
        };
        let operands = RawForward {
            x: views.x.address,
            x_stride,
            gate: views.gate.address,
            gate_stride,
            up: views.up.address,
            up_stride,
            gate_bias: views.gate_bias.map_or(0, |bias| bias.address),
            up_bias: views.up_bias.map_or(0, |bias| bias.address),
            z: z.1,
            z_stride: n,
            saved_gate,
            saved_gate_stride,
            saved_up,
            saved_up_stride,
            ..RawForward::default()
        };
        run(py, &plan, &Call { stream, m: m.unsigned_abs(), operands })?;
        let layer = Layer {
            shape,
            x: views.x.lie,
            gate: views.gate.lie,
            up: views.up.lie,
            down: views.down.map(|down| down.lie),
        };
        Ok(Some(Done { z, kept, layer }))
    }

    fn read_all(&self, operands: &Operands<&Object<'_>>) -> Option<Operands<View>> {
        Some(Operands {
            x: self.plain(operands.x)?,
            gate: self.plain(operands.gate)?,
            up: self.plain(operands.up)?,
            gate_bias: self.plain_if_any(operands.gate_bias)?,
            up_bias: self.plain_if_any(operands.up_bias)?,
            down: self.plain_if_any(operands.down)?,
            down_bias: self.plain_if_any(operands.down_bias)?,
        })
    }

    fn read_taken(&self, taken: &Taken<&Object<'_>>) -> Option<Taken<View>> {
        Some(Taken {
            dy: self.plain(taken.dy)?,
            x: self.plain(taken.x)?,
            gate: self.plain(taken.gate)?,
            up: self.plain(taken.up)?,
            down: self.plain_if_any(taken.down)?,
            kept: self.plain_if_any(taken.kept)?,
        })
    }
}

/// What a backward has to make.
#[derive(Debug, Clone, Copy)]
struct Needs {
    /// The gradients of the pre-activations take their place.
    in_place: bool,
    x: bool,
    weights: bool,
    down: bool,
}

/// What a backward writes, as far as it is there; held until the last launch that reads it is queued.
struct Outputs<'py> {
    /// The pre-activations, if they were computed again.
    again: Option<Made<'py>>,
    /// Their gradients, if not in place.
    grads: Option<Made<'py>>,
    /// For the gradient of down.
    z: Option<Made<'py>>,
    dx: Option<Made<'py>>,
    d_gate: Option<Made<'py>>,
    d_up: Option<Made<'py>>,
    /// Row stride of both.
    d_stride: i64,
    d_down: Option<Made<'py>>,
}

/// One backward of `layer`.
struct Gradients<'a, 'py> {
    torch: &'a Torch,
    py: Python<'py>,
    layer: &'a Layer,
    needs: Needs,
}

impl<'py> Gradients<'_, 'py> {
    /// The outputs that have to be there before the launches; None where one cannot be. `again` is the forward, if it was
    /// computed again.
    fn before_launch(
        &self,
        again: Option<Done<'py>>,
        d_weights: Option<(Object<'py>, Object<'py>)>,
    ) -> PyResult<Option<Outputs<'py>>> {
        let Needs { in_place, x, weights, down } = self.needs;
        let shape @ Shape { m, n, k, .. } = self.layer.shape;
        let (again, z) = again.map_or((None, None), |done| (done.kept, Some(done.z)));
        let Some(grads) = self.make(!in_place, &[2 * m * n], false)? else { return Ok(None) };
        let Some(new_z) = self.make(down && z.is_none(), &[m, n], false)? else { return Ok(None) };
        let Some((d_gate, d_up, d_stride)) = self.given(d_weights) else { return Ok(None) };
        // What is to be overwritten is safe until one output is there: a thread that gets one gets all.
        let is_first = in_place && again.is_none() && new_z.is_none();
        let Some(dx) = self.make(is_first && x, self.layer.x.shape(), false)? else { return Ok(None) };
        let is_first = is_first && !x && weights && d_gate.is_none();
        let Some(first) = self.make(is_first, &[n, k], shape.is_kn())? else { return Ok(None) };
        let z = new_z.or(z.filter(|_| down));
        Ok(Some(Outputs { again, grads, z, dx, d_gate: d_gate.or(first), d_up, d_stride, d_down: None }))
    }

    /// The gradients of both weights, if they are given and needed, and the row stride that they have or will have.
    fn given(
        &self,
        d_weights: Option<(Object<'py>, Object<'py>)>,
    ) -> Option<(Option<Made<'py>>, Option<Made<'py>>, i64)> {
        let shape = self.layer.shape;
        let Some((d_gate, d_up)) = d_weights.filter(|_| self.needs.weights) else {
            return Some((None, None, if shape.is_kn() { shape.n } else { shape.k }));
        };
        let (first, second) = (self.torch.exchange.read(&d_gate)?, self.torch.exchange.read(&d_up)?);
        let &[down, across] = first.lie.strides() else { return None };
        let stride = if shape.is_kn() { across } else { down };
        Some((Some((d_gate, first.address)), Some((d_up, second.address)), stride))
    }

    /// Launches all, and makes the other outputs in between.
    fn launch(
        &self,
        steps: &Steps<'_>,
        backward: Backward,
        mut outputs: Outputs<'py>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let (needs, shape @ Shape { n, k, .. }) = (self.needs, self.layer.shape);
        let of_saved = outputs.again.as_ref().map_or(backward.of_saved, |again| shape.halves(again.1));
        let of_grads = outputs.grads.as_ref().map_or(of_saved, |grads| shape.halves(grads.1));
        let backward = Backward { of_saved, of_grads, ..backward };
        let z = outputs.z.take();
        let of_z = z.as_ref().map(|z| (z.1, n));

        // The GPU begins before the other outputs are allocated.
        backward.gated(steps, of_z.filter(|_| outputs.again.is_none()))?;
        if let (Some(down), Some(of_z)) = (&backward.of_down, of_z) {
            let (rows, is_kn) = (down.rows.cast_signed(), down.major == WeightMajor::N);
            self.fill(&mut outputs.d_down, needs.down, &[rows, n], is_kn)?;
            if let Some((_, d_down)) = &outputs.d_down {
                backward.down_weight_grad(steps, of_z, (*d_down, if is_kn { rows } else { n }))?;
            }
        }
        self.fill(&mut outputs.dx, needs.x, self.layer.x.shape(), false)?;
        // The gradients of gate and up may take its memory: the stream writes them later.
        drop(z);
        if let Some((_, dx)) = &outputs.dx {
            backward.input_grad(steps, (*dx, k))?;
        }
        self.fill(&mut outputs.d_gate, needs.weights, &[n, k], shape.is_kn())?;
        self.fill(&mut outputs.d_up, needs.weights, &[n, k], shape.is_kn())?;
        if let (Some((_, d_gate)), Some((_, d_up))) = (&outputs.d_gate, &outputs.d_up) {
            backward.weight_grad(steps, (*d_gate, outputs.d_stride, *d_up, outputs.d_stride))?;
        }
        let tensor = |made: Option<Made<'py>>| made.map(|made| made.0);
        let Outputs { dx, d_gate, d_up, d_down, .. } = outputs;
        (tensor(dx), tensor(d_gate), tensor(d_up), tensor(d_down)).into_pyobject(self.py)
    }

    /// An output, if it is needed; None where it cannot be made.
    fn make(&self, needed: bool, shape: &[i64], transposed: bool) -> PyResult<Option<Option<Made<'py>>>> {
        if !needed {
            return Ok(Some(None));
        }
        Ok(self.torch.allocate(self.py, &self.layer.x, shape, transposed)?.map(Some))
    }

    /// Makes an output that is needed and not there yet; by then there is no way back.
    fn fill(&self, output: &mut Option<Made<'py>>, needed: bool, shape: &[i64], transposed: bool) -> PyResult<()> {
        if output.is_none() {
            let none = || PyRuntimeError::new_err("an output could not be allocated after the backward had begun");
            *output = self.make(needed, shape, transposed)?.ok_or_else(none)?;
        }
        Ok(())
    }
}

/// The shape of operands that fit each other without a copy, and are not empty.
fn shape_of(views: &Operands<View>) -> Option<Shape> {
    let (x, gate, up) = (&views.x.lie, &views.gate.lie, &views.up.lie);
    let (m, cols, x_stride) = rows(x)?;
    let &[n, k] = gate.shape() else { return None };
    let fits = k == cols && n > 0 && up.shape() == gate.shape() && is_alike(gate, x) && is_alike(up, x);
    let (layout, gate_stride, up_stride) = weights(gate, up)?;
    if !fits || !fits_bias(views.gate_bias.as_ref(), n, x) || !fits_bias(views.up_bias.as_ref(), n, x) {
        return None;
    }
    if let Some(down) = &views.down {
        let (out, ..) = down_matrix(&down.lie, n, x)?;
        if !fits_bias(views.down_bias.as_ref(), out, x) {
            return None;
        }
    }
    Some(Shape { device: x.device, dtype: x.dtype?, m, n, k, layout, x_stride, gate_stride, up_stride })
}

fn fits_bias(bias: Option<&View>, len: i64, like: &Lie) -> bool {
    bias.is_none_or(|bias| is_vector(&bias.lie, len, like))
}
