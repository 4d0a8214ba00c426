//! What is to be tuned: presets and shape files, as groups of problems that share weights.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;
use swiglu_kernels::{DType, Op, Problem, WeightLayout};
use swiglu_runtime::runtime::largest_size;

/// The values of M that are tuned when none are given.
pub(crate) const ANCHORS: [u32; 22] =
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192];

/// What `--op` takes: an op, or a word for several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OpChoice(Vec<Op>);

/// What a backward launches: of the whole FFN, of the gated half alone, and with biases.
const BACKWARD: [Op; 7] =
    [Op::Dgated, Op::GateBackward, Op::InputGrad, Op::WeightGrad, Op::DownWeightGrad, Op::BiasGrad, Op::DownBiasGrad];

impl FromStr for OpChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "backward" => Ok(Self(BACKWARD.into())),
            "ffn" => Ok(Self([Op::ForwardSave, Op::Gate, Op::Down].into_iter().chain(BACKWARD).collect())),
            op => op.parse().map(|op| Self(vec![op])).map_err(|error| format!("{error}; or of backward, ffn")),
        }
    }
}

/// The ops of all choices, each once, in their order.
pub(crate) fn ops(choices: &[OpChoice]) -> Vec<Op> {
    let mut seen = BTreeSet::new();
    choices.iter().flat_map(|choice| &choice.0).copied().filter(|&op| seen.insert(op)).collect()
}

/// Problems that differ in M only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) op: Op,
    pub(crate) dtype: DType,
    pub(crate) layout: WeightLayout,
    pub(crate) n: u32,
    pub(crate) k: u32,
    /// Ascending.
    pub(crate) m: Vec<u32>,
}

impl Group {
    /// The problem for `m` tokens.
    pub(crate) fn problem(&self, m: u32) -> Problem {
        Problem::forward(self.dtype, self.layout.major(), m, self.n, self.k).with_op(self.op)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Models {
    model: Vec<Model>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    name: String,
    k: u32,
    n: u32,
    m: Option<Vec<u32>>,
}

/// A shapes file: `[[shape]]` tables with `n`, `k`, and optionally `m`, `dtype`, `layout`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shapes {
    shape: Vec<Shape>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    n: u32,
    k: u32,
    m: Option<Vec<u32>>,
    dtype: Option<Vec<DType>>,
    layout: Option<Vec<WeightLayout>>,
}

fn models() -> Result<Vec<Model>> {
    let models: Models = toml::from_str(include_str!("../models.toml")).context("models.toml")?;
    Ok(models.model)
}

/// The name of a preset, for an argument.
pub(crate) fn model_name(text: &str) -> Result<String, String> {
    match preset(Some(text), &[], &[]) {
        Ok(_) => Ok(text.into()),
        Err(why) => Err(format!("{why:#}")),
    }
}

/// One model's problems; every preset but `tiny` where `name` is `None`.
pub(crate) fn preset(name: Option<&str>, dtypes: &[DType], layouts: &[WeightLayout]) -> Result<Vec<Group>> {
    let models = models()?;
    let known: Vec<_> = models.iter().map(|model| model.name.clone()).collect();
    let chosen: Vec<Model> =
        models.into_iter().filter(|model| name.map_or(model.name != "tiny", |name| model.name == name)).collect();
    if chosen.is_empty() {
        bail!("`{}` is no model preset; use one of {}", name.unwrap_or_default(), known.join(", "));
    }
    let groups = dtypes.iter().flat_map(|&dtype| {
        chosen.iter().flat_map(move |model| {
            layouts.iter().map(move |&layout| group(model.n, model.k, model.m.as_deref(), dtype, layout))
        })
    });
    Ok(without_repeats(groups))
}

/// The problems of a shapes file; `dtypes` and `layouts` hold where a shape names none.
pub(crate) fn from_file(path: &Path, dtypes: &[DType], layouts: &[WeightLayout]) -> Result<Vec<Group>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("shapes file {}", path.display()))?;
    let shapes: Shapes = toml::from_str(&text).with_context(|| format!("shapes file {}", path.display()))?;
    let groups = shapes.shape.iter().flat_map(|shape| {
        let dtypes = shape.dtype.as_deref().unwrap_or(dtypes);
        let layouts = shape.layout.as_deref().unwrap_or(layouts);
        dtypes.iter().flat_map(move |&dtype| {
            layouts.iter().map(move |&layout| group(shape.n, shape.k, shape.m.as_deref(), dtype, layout))
        })
    });
    let groups = without_repeats(groups);
    if groups.is_empty() {
        bail!("shapes file {} names no shape; add a [[shape]] table with n and k", path.display());
    }
    if let Some(group) =
        groups.iter().find(|group| group.m.is_empty() || group.m.contains(&0) || group.n == 0 || group.k == 0)
    {
        bail!(
            "shapes file {}: sizes must be positive, found m {:?}, n {}, k {}",
            path.display(),
            group.m,
            group.n,
            group.k
        );
    }
    groups.iter().try_for_each(check_size).with_context(|| format!("shapes file {}", path.display()))?;
    Ok(groups)
}

/// Larger sizes would be tuned for nobody: no plan takes them.
fn check_size(group: &Group) -> Result<()> {
    let most = largest_size(group.dtype);
    for (name, size) in [("n", group.n), ("k", group.k)] {
        if size > most {
            bail!(
                "{name} {size} is larger than the {most} that {} has kernels for; take a smaller {name}",
                group.dtype
            );
        }
    }
    Ok(())
}

fn group(n: u32, k: u32, m: Option<&[u32]>, dtype: DType, layout: WeightLayout) -> Group {
    let m: BTreeSet<u32> = m.unwrap_or(&ANCHORS).iter().copied().collect();
    Group { op: Op::Forward, dtype, layout, n, k, m: m.into_iter().collect() }
}

/// The groups for each of `ops`, in their order.
pub(crate) fn for_ops(groups: &[Group], ops: &[Op]) -> Vec<Group> {
    ops.iter().flat_map(|&op| groups.iter().map(move |group| Group { op, ..group.clone() })).collect()
}

/// Keeps the first of equal groups: layouts with one weight order are one problem.
fn without_repeats(groups: impl Iterator<Item = Group>) -> Vec<Group> {
    let mut seen = BTreeSet::new();
    groups.filter(|group| seen.insert((group.dtype, group.layout.major(), group.n, group.k, group.m.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_kernels::families::{Target, candidates};
    use swiglu_kernels::{WeightMajor, arch};

    #[test]
    fn a_word_for_several_ops_names_each_once() {
        let choices = |words: &[&str]| words.iter().map(|word| word.parse().unwrap()).collect::<Vec<OpChoice>>();
        assert_eq!(ops(&choices(&["forward", "gate"])), [Op::Forward, Op::Gate]);
        let all = ops(&choices(&["dgated", "backward", "ffn"]));
        assert_eq!(all, [&BACKWARD[..], &[Op::ForwardSave, Op::Gate, Op::Down]].concat());
        assert!("backwards".parse::<OpChoice>().unwrap_err().contains("dgated"));
    }

    /// `_steps.py` and the FFN's plan name what is launched.
    #[test]
    fn ffn_is_all_that_training_launches_and_each_op_is_raced() {
        let launched = [
            Op::ForwardSave,
            Op::Gate,
            Op::Down,
            Op::Dgated,
            Op::GateBackward,
            Op::InputGrad,
            Op::WeightGrad,
            Op::DownWeightGrad,
            Op::BiasGrad,
            Op::DownBiasGrad,
        ];
        assert_eq!(ops(&["ffn".parse().unwrap()]), launched);
        let target = Target::Gpu(arch::by_name("sm_90a").unwrap());
        for (op, dtype) in
            launched.into_iter().flat_map(|op| [DType::Bf16, DType::F16, DType::F32].map(|dtype| (op, dtype)))
        {
            let problem = Problem::forward(dtype, WeightMajor::K, 8, 1024, 512).with_op(op);
            assert!(candidates(&problem, target).len() > 1, "{op} {dtype}");
        }
    }

    #[test]
    fn presets_are_the_ones_promised() {
        let names: Vec<String> = models().unwrap().into_iter().map(|model| model.name).collect();
        for name in [
            "tiny",
            "llama-3.2-1b",
            "llama-2-7b",
            "llama-3-8b",
            "qwen2.5-7b",
            "llama-3-70b",
            "llama-3-70b-tp8",
            "mixtral-expert",
        ] {
            assert!(names.iter().any(|known| known == name), "{name}");
        }
        let error = preset(Some("gpt-9"), &[DType::Bf16], &[WeightLayout::SeparateNk]).unwrap_err().to_string();
        assert!(error.contains("llama-3-8b"), "{error}");
    }

    #[test]
    fn equal_problems_are_tuned_once() {
        let layouts = [WeightLayout::SeparateNk, WeightLayout::PackedNk, WeightLayout::PackedKn];
        let groups = preset(Some("tiny"), &[DType::Bf16], &layouts).unwrap();
        assert_eq!(groups.len(), 2);
        assert_eq!(preset(None, &[DType::Bf16], &layouts[..1]).unwrap().len(), 6);
    }

    #[test]
    fn the_shapes_of_the_regret_are_twelve_problems() {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/regret.toml"));
        let groups = from_file(path, &[DType::Bf16], &[WeightLayout::SeparateNk]).unwrap();
        assert_eq!(groups.iter().map(|group| group.m.len()).sum::<usize>(), 12);
    }

    #[test]
    fn a_shapes_file_says_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shapes.toml");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            from_file(&path, &[DType::Bf16], &[WeightLayout::SeparateNk])
        };
        let groups = read("[[shape]]\nn = 96\nk = 64\nm = [8, 1, 8]\ndtype = [\"f16\", \"tf32\"]").unwrap();
        assert_eq!((groups.len(), groups[0].m.clone()), (2, vec![1, 8]));
        for bad in
            ["", "[[shape]]\nn = 96", "[[shape]]\nn = 96\nk = 0", "[[shape]]\nn = 9\nk = 9\nwidth = 1", "shape = []"]
        {
            let error = format!("{:#}", read(bad).unwrap_err());
            assert!(error.contains("shapes.toml"), "{error}");
        }
        let most = largest_size(DType::Bf16);
        assert!(read(&format!("[[shape]]\nn = {most}\nk = {most}")).is_ok());
        for (n, k, named) in [(most + 1, 8, "n"), (8, most + 1, "k")] {
            let error = format!("{:#}", read(&format!("[[shape]]\nn = {n}\nk = {k}")).unwrap_err());
            assert!(error.contains("shapes.toml") && error.contains(&format!("a smaller {named}")), "{error}");
        }
    }
}
