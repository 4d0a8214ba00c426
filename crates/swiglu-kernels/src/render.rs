//! Templates to CUDA source. Pure: equal inputs give equal bytes, so the digest is a cache key.

use crate::ArchSpec;
use crate::families::{Config, Family, Rejected, Staging, Target, wgmma_tma};
use crate::problem::Problem;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use tera::{Context, Delimiters, Tera, Value};

/// One compilable CUDA source, headers written out in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSource {
    /// Name for messages, e.g. `mma_sync`.
    pub name: &'static str,
    /// The `extern "C"` kernel to launch.
    pub entry: &'static str,
    /// A kernel of the same source that is launched before it, to prepare its operands.
    pub prologue: Option<&'static str>,
    /// The whole translation unit; `#line` keeps compiler messages at the template's lines.
    pub text: String,
    /// BLAKE3 of `text`, in hex.
    pub digest: String,
}

/// Why no source came out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RenderError {
    /// The config is not legal for the problem on that architecture.
    #[error("`{config}` is not legal here: {rejected}")]
    Illegal {
        /// The config.
        config: String,
        /// The broken rule.
        rejected: Rejected,
    },
    /// The family has no source.
    #[error("family `{0}` has no CUDA source, so there is nothing to render or compile")]
    NoSource(Family),
    /// The template engine refused: a defect of a template.
    #[error("template `{template}`: {source}")]
    Template {
        /// Name of the template.
        template: &'static str,
        /// Tera's report.
        source: tera::Error,
    },
    /// A template includes a header that does not exist: a defect of a template.
    #[error("template `{template}` includes `{header}`, which is no header of this crate")]
    MissingHeader {
        /// Name of the template.
        template: &'static str,
        /// The header.
        header: String,
    },
}

/// Fields of configs that are launch parameters: they never reach a template, so that every raster
/// order shares one CUBIN.
pub const LAUNCH_FIELDS: [&str; 3] = ["raster", "raster_group", "fill"];

/// Fields that choose the template and stand in none.
const TEMPLATE_FIELDS: [&str; 1] = ["staging"];

macro_rules! template {
    ($name:literal) => {
        ($name, include_str!(concat!("../templates/", $name)))
    };
}

const TEMPLATES: [(&str, &str); 14] = [
    template!("simt/kernel.cu.tera"),
    template!("mma_direct/kernel.cu.tera"),
    template!("mma_direct/weight_only.cu.tera"),
    template!("weight_only_tma/kernel.cu.tera"),
    template!("mma_sync/cp_async.cu.tera"),
    template!("mma_sync/tma.cu.tera"),
    template!("wgmma_stream/kernel.cu.tera"),
    template!("wgmma_tma/kernel.cu.tera"),
    template!("elementwise/kernel.cu.tera"),
    template!("column_sum/kernel.cu.tera"),
    template!("simt_gemm/kernel.cu.tera"),
    template!("mma_gemm/kernel.cu.tera"),
    template!("wgmma_gemm/kernel.cu.tera"),
    template!("support/kernels.cu.tera"),
];

const HEADERS: [(&str, &str); 37] = [
    template!("shared/types.cuh"),
    template!("shared/activation.cuh"),
    template!("shared/params.cuh"),
    template!("shared/step_params.cuh"),
    template!("shared/step_finish.cuh"),
    template!("shared/step_tile.cuh"),
    template!("shared/raster.cuh"),
    template!("shared/ring.cuh"),
    template!("shared/split.cuh"),
    template!("mma_sync/tile.cuh"),
    template!("mma_sync/copy_ring.cuh"),
    template!("mma_sync/fragments.cuh"),
    template!("mma_gemm/fragments.cuh"),
    template!("mma_direct/epilogue.cuh"),
    template!("mma_direct/expand.cuh"),
    template!("simt/tile.cuh"),
    template!("wgmma_tma/pipeline.cuh"),
    template!("wgmma_tma/store.cuh"),
    template!("wgmma_tma/scales.cuh"),
    template!("wgmma_tma/sum_anew.cuh"),
    template!("wgmma_gemm/gate_strips.cuh"),
    template!("wgmma_gemm/sum_anew.cuh"),
    template!("wgmma_tma/sum_exchange.cuh"),
    template!("shared/ptx/convert.cuh"),
    template!("shared/ptx/pairs.cuh"),
    template!("shared/ptx/special.cuh"),
    template!("shared/ptx/smem.cuh"),
    template!("shared/ptx/grid.cuh"),
    template!("shared/ptx/relaxed.cuh"),
    template!("shared/ptx/stream.cuh"),
    template!("shared/ptx/cp_async.cuh"),
    template!("shared/ptx/hopper.cuh"),
    template!("shared/ptx/mbarrier.cuh"),
    template!("shared/ptx/tma.cuh"),
    template!("shared/ptx/transpose.cuh"),
    template!("shared/ptx/wgmma.cuh"),
    template!("shared/ptx/mma_sync.cuh"),
];

/// The engine, or the report of why the built-in templates do not parse.
static ENGINE: LazyLock<Result<Tera, String>> = LazyLock::new(|| {
    let mut tera = Tera::default();
    // `{%0, %1}` and `{{0.f}}` are CUDA; these delimiters are not.
    let delimiters = Delimiters {
        block_start: "<%".into(),
        block_end: "%>".into(),
        variable_start: "<$".into(),
        variable_end: "$>".into(),
        comment_start: "<#".into(),
        comment_end: "#>".into(),
    };
    tera.set_delimiters(delimiters).map_err(|error| error.to_string())?;
    tera.add_raw_templates(TEMPLATES).map_err(|error| error.to_string())?;
    Ok(tera)
});

fn engine(template: &'static str) -> Result<&'static Tera, RenderError> {
    ENGINE.as_ref().map_err(|report| RenderError::Template { template, source: tera::Error::message(report) })
}

/// The source of `config` for `problem`; M, N, K and the raster order are launch parameters.
///
/// # Errors
/// [`RenderError::Illegal`] when [`Config::check`] refuses, [`RenderError::NoSource`] for a family without.
pub fn render(problem: &Problem, config: &Config, arch: &'static ArchSpec) -> Result<KernelSource, RenderError> {
    check(problem, config, arch)?;
    let template = template_of(problem, config)?;
    let mut context = Context::new();
    for (name, value) in values(problem, config, template)? {
        context.insert_value(name, value);
    }
    let entry = if problem.op.is_forward() { "swiglu_forward" } else { "swiglu_step" };
    let is_split = matches!(config, Config::WgmmaTma(_) | Config::WgmmaGemm(_)) && wgmma_tma::is_split(problem.dtype);
    let rendered = source(config.family().name(), entry, template, &context)?;
    Ok(KernelSource { prologue: is_split.then_some("swiglu_split"), ..rendered })
}

fn check(problem: &Problem, config: &Config, arch: &'static ArchSpec) -> Result<(), RenderError> {
    let illegal = |rejected| RenderError::Illegal { config: config.to_string(), rejected };
    config.check(problem, Target::Gpu(arch)).map_err(illegal)
}

/// What tells whether a record is of what would run now: the digest of the source. A library's config has none: that of its
/// own words. Which version of the library ran is not among them, as that of the driver is not.
///
/// # Errors
/// As [`render`], but for a library's config.
pub fn digest(problem: &Problem, config: &Config, arch: &'static ArchSpec) -> Result<String, RenderError> {
    if let Config::Cublaslt(_) = config {
        check(problem, config, arch)?;
        return Ok(blake3::hash(config.to_string().as_bytes()).to_hex().to_string());
    }
    Ok(render(problem, config, arch)?.digest)
}

/// A source and the configs that share it: they differ in launch parameters only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedSource {
    /// The source.
    pub source: KernelSource,
    /// At least one.
    pub configs: Vec<Config>,
}

/// The sources of `configs`, each once, in the order of their first config; configs of families without are left out.
///
/// # Errors
/// As [`render`].
pub fn shared_sources(
    problem: &Problem,
    configs: &[Config],
    arch: &'static ArchSpec,
) -> Result<Vec<SharedSource>, RenderError> {
    let mut shared: Vec<SharedSource> = Vec::new();
    let mut index_of: BTreeMap<String, usize> = BTreeMap::new();
    for &config in configs.iter().filter(|config| config.family().has_source()) {
        let source = render(problem, &config, arch)?;
        let index = *index_of.entry(source.digest.clone()).or_insert(shared.len());
        match shared.get_mut(index) {
            Some(known) => known.configs.push(config),
            None => shared.push(SharedSource { source, configs: vec![config] }),
        }
    }
    Ok(shared)
}

/// The tuner's helper kernels for the number format and weight order of `problem`.
///
/// # Errors
/// A defect of the template.
pub fn render_support(problem: &Problem) -> Result<KernelSource, RenderError> {
    let mut context = Context::new();
    context.insert("dtype", problem.dtype.name());
    context.insert("activation", problem.activation.name());
    context.insert("weight_major", problem.weight_major.name());
    source("support", "oracle_forward", "support/kernels.cu.tera", &context)
}

fn template_of(problem: &Problem, config: &Config) -> Result<&'static str, RenderError> {
    match config {
        Config::Simt(_) => Ok("simt/kernel.cu.tera"),
        Config::MmaDirect(_) if problem.dtype.is_scaled() => Ok("mma_direct/weight_only.cu.tera"),
        Config::MmaDirect(_) => Ok("mma_direct/kernel.cu.tera"),
        Config::WeightOnlyTma(_) => Ok("weight_only_tma/kernel.cu.tera"),
        Config::MmaSync(config) => match config.staging {
            Staging::CpAsync => Ok("mma_sync/cp_async.cu.tera"),
            Staging::Tma => Ok("mma_sync/tma.cu.tera"),
        },
        Config::WgmmaStream(_) => Ok("wgmma_stream/kernel.cu.tera"),
        Config::WgmmaTma(_) => Ok("wgmma_tma/kernel.cu.tera"),
        Config::Elementwise(_) => Ok("elementwise/kernel.cu.tera"),
        Config::ColumnSum(_) => Ok("column_sum/kernel.cu.tera"),
        Config::SimtGemm(_) => Ok("simt_gemm/kernel.cu.tera"),
        Config::MmaGemm(_) => Ok("mma_gemm/kernel.cu.tera"),
        Config::WgmmaGemm(_) => Ok("wgmma_gemm/kernel.cu.tera"),
        Config::Cublaslt(_) | Config::Cpu(_) => Err(RenderError::NoSource(config.family())),
    }
}

/// The problem's names for the templates: of a GEMM the orders of its operands, of the forward the weights' order.
fn problem_names(problem: &Problem) -> Vec<(&'static str, &'static str)> {
    // When weights are read is the matter of two families, which are told of it beside.
    let op = problem.op.stand_in().filter(|_| problem.op.has_static_weights()).unwrap_or(problem.op);
    let mut names = vec![("op", op.name()), ("dtype", problem.dtype.name()), ("activation", problem.activation.name())];
    if problem.op.is_forward() {
        names.push(("weight_major", problem.weight_major.name()));
    }
    if let Some(product) = problem.product().filter(|_| !problem.op.is_column_sum()) {
        names.extend([
            ("left", product.left.name()),
            ("right", product.right.name()),
            ("paired", product.paired.name()),
        ]);
    }
    names
}

/// What the template sees: the config's fields, the problem's names, the derived sizes.
fn values(problem: &Problem, config: &Config, template: &'static str) -> Result<BTreeMap<String, Value>, RenderError> {
    let fields = match config {
        Config::Simt(config) => Value::try_from_serializable(config),
        Config::MmaDirect(config) => Value::try_from_serializable(config),
        Config::WeightOnlyTma(config) => Value::try_from_serializable(config),
        Config::MmaSync(config) => Value::try_from_serializable(config),
        Config::WgmmaStream(config) => Value::try_from_serializable(config),
        Config::WgmmaTma(config) => Value::try_from_serializable(config),
        Config::Elementwise(config) => Value::try_from_serializable(config),
        Config::ColumnSum(config) => Value::try_from_serializable(config),
        Config::SimtGemm(config) => Value::try_from_serializable(config),
        Config::MmaGemm(config) => Value::try_from_serializable(config),
        Config::WgmmaGemm(config) => Value::try_from_serializable(config),
        Config::Cublaslt(_) | Config::Cpu(_) => return Err(RenderError::NoSource(config.family())),
    };
    let fields = fields.map_err(|source| RenderError::Template { template, source })?.into_map().unwrap_or_default();
    let mut values: BTreeMap<_, _> = fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    for field in LAUNCH_FIELDS.into_iter().chain(TEMPLATE_FIELDS) {
        values.remove(field);
    }
    for (name, value) in problem_names(problem) {
        values.insert(name.into(), Value::from(value));
    }
    if let Some(shape) = config.launch_shape(problem).filter(|shape| shape.smem_bytes > 0) {
        values.insert("smem_bytes".into(), Value::from(shape.smem_bytes));
    }
    // Tiles of many tokens read them no earlier, and have one source.
    let reads_ahead = match config {
        Config::WgmmaStream(_) => Some(true),
        Config::WgmmaTma(tma) => Some(tma.consumers == 1 && tma.cluster_m * tma.cluster_n == 1),
        Config::WgmmaGemm(gemm) => Some(gemm.consumers == 1 && gemm.cluster_m * gemm.cluster_n == 1),
        _ => None,
    };
    if let Some(reads_ahead) = reads_ahead {
        values.insert("static_weights".into(), Value::from(reads_ahead && problem.op.has_static_weights()));
    }
    Ok(values)
}

fn source(
    name: &'static str,
    entry: &'static str,
    template: &'static str,
    context: &Context,
) -> Result<KernelSource, RenderError> {
    let body =
        engine(template)?.render(template, context).map_err(|source| RenderError::Template { template, source })?;
    let mut text = String::with_capacity(2 * body.len());
    write_out(&mut text, template, template, &body, &mut BTreeSet::new())?;
    let digest = blake3::hash(text.as_bytes()).to_hex().to_string();
    Ok(KernelSource { name, entry, prologue: None, text, digest })
}

/// Copies `body`, each header in place of its first `#include`.
fn write_out(
    text: &mut String,
    template: &'static str,
    file: &str,
    body: &str,
    seen: &mut BTreeSet<String>,
) -> Result<(), RenderError> {
    text.push_str(&format!("#line 1 \"{file}\"\n"));
    for (number, line) in body.lines().enumerate() {
        let Some(header) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        if seen.insert(header.into()) {
            let content = HEADERS.iter().find(|(name, _)| *name == header).map(|(_, content)| *content);
            let content = content.ok_or_else(|| RenderError::MissingHeader { template, header: header.into() })?;
            write_out(text, template, header, content, seen)?;
            text.push_str(&format!("#line {} \"{file}\"\n", number + 2));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch;
    use crate::families::CublasltConfig;
    use crate::problem::{DType, Op, WeightMajor};

    /// Tera takes an unknown name in `if` for false, so the names a template uses are held to those it gets.
    #[test]
    fn templates_use_exactly_the_names_they_are_given() {
        let arch = arch::by_name("sm_90a").unwrap();
        let mut seen = BTreeSet::new();
        let forward = Problem::forward(DType::Bf16, WeightMajor::K, 64, 64, 64);
        let weight_only = Problem::forward(DType::Bf16E4m3, WeightMajor::K, 64, 64, 64);
        let steps = [Op::Gate, Op::Dgated, Op::BiasGrad].map(|op| forward.with_op(op));
        let problems = [forward, weight_only].into_iter().chain(steps);
        let candidates = |problem: Problem| {
            let all = crate::families::candidates(&problem, Target::Gpu(arch)).into_iter();
            all.filter(|config| config.family().has_source()).map(move |config| (problem, config))
        };
        for (problem, config) in problems.flat_map(candidates) {
            let template = template_of(&problem, &config).unwrap();
            if !seen.insert(template) {
                continue;
            }
            let used = engine(template).unwrap().get_template_variables(template).unwrap();
            let used: BTreeSet<_> = used.into_iter().map(String::from).collect();
            let given: BTreeSet<_> = values(&problem, &config, template).unwrap().into_keys().collect();
            assert_eq!(used, given, "left: names that {template} uses, right: those it is given");
            let exempt = LAUNCH_FIELDS.into_iter().chain(TEMPLATE_FIELDS).map(String::from);
            let kept: BTreeSet<_> = given.into_iter().chain(exempt).collect();
            for name in serde_names(&config) {
                assert!(kept.contains(&name), "{template} is not given `{name}`");
            }
        }
        assert_eq!(seen.len(), TEMPLATES.len() - 1, "every template but the support kernels");
    }

    fn serde_names(config: &Config) -> Vec<String> {
        let table = toml::Table::try_from(config).unwrap();
        table.keys().filter(|key| *key != "family").cloned().collect()
    }

    #[test]
    fn equal_inputs_give_equal_bytes_and_raster_order_does_not_matter() {
        let arch = arch::by_name("sm_80").unwrap();
        let problem = Problem::forward(DType::F16, WeightMajor::N, 64, 128, 256);
        let configs = crate::families::candidates(&problem, Target::Gpu(arch));
        let Some(&Config::MmaSync(config)) = configs.last() else { panic!("the last candidate on sm_80 is mma_sync") };
        let other =
            crate::families::MmaSyncConfig { raster: crate::families::Raster::AlongM, raster_group: 3, ..config };
        let first = render(&problem, &Config::MmaSync(config), arch).unwrap();
        assert_eq!(first, render(&problem, &Config::MmaSync(other), arch).unwrap());
        let both = [Config::MmaSync(config), Config::MmaSync(other)];
        let shared = shared_sources(&problem, &both, arch).unwrap();
        assert_eq!(shared, [SharedSource { source: first, configs: both.to_vec() }]);
    }

    #[test]
    fn a_library_has_a_digest_of_its_own_and_no_source() {
        let arch = arch::by_name("sm_90a").unwrap();
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 64, 128, 256).with_op(Op::Down);
        let of = |algorithm| Config::Cublaslt(CublasltConfig { algorithm });
        assert!(matches!(render(&problem, &of(0), arch), Err(RenderError::NoSource(Family::Cublaslt))));
        let digests = [0, 1].map(|algorithm| digest(&problem, &of(algorithm), arch).unwrap());
        assert_ne!(digests[0], digests[1]);
        assert_eq!(digests[0], digest(&problem.with_m(1), &of(0), arch).unwrap());
        assert!(matches!(digest(&problem, &of(8), arch), Err(RenderError::Illegal { .. })));
        let ours = crate::families::default_config(&problem, arch).unwrap();
        assert_eq!(digest(&problem, &ours, arch).unwrap(), render(&problem, &ours, arch).unwrap().digest);
        let shared = shared_sources(&problem, &[of(0), ours], arch).unwrap();
        assert_eq!(shared.iter().flat_map(|shared| shared.configs.clone()).collect::<Vec<_>>(), [ours]);
    }

    #[test]
    fn a_header_stands_once_and_lines_are_kept() {
        let problem = Problem::forward(DType::F16, WeightMajor::N, 64, 128, 256);
        let text = render_support(&problem).unwrap().text;
        assert_eq!(text.matches("enum class DType").count(), 1);
        assert!(!text.contains("#include"));
        let support = TEMPLATES.iter().find(|(name, _)| name.starts_with("support")).unwrap().1;
        let line = support.lines().position(|line| line.starts_with("constexpr DType")).unwrap() + 1;
        let marker = format!("#line {} \"support/kernels.cu.tera\"\n\nconstexpr DType kDType = DType::f16;", line - 1);
        assert!(text.contains(&marker), "{marker}");
    }
}
