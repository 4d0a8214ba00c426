//! Which anchor serves which M. Exact up to 8, then four buckets an octave: a table index, no search.
//!
//! Between anchors the nearest one's kernel may be a bad choice: at M = 9 a kernel for 8 tokens reads the weights twice. So of
//! the anchors on both sides that one serves whose kernel should take least: what was measured at its anchor, times its waves
//! of tiles here over those there.

use crate::plan::Choice;
use swiglu_kernels::Problem;
use swiglu_kernels::model::Chip;

/// Number of buckets: 0..=8, then four for each of the octaves up to 2^31.
const COUNT: usize = 9 + 4 * 28;

/// The bucket of `m`.
pub(crate) fn bucket_of(m: u32) -> usize {
    if m <= 8 {
        return m as usize;
    }
    let octave = (m - 1).ilog2();
    let quarter = ((m - 1) >> (octave - 2)) & 3;
    (9 + 4 * (octave - 3) + quarter) as usize
}

/// The largest M of a bucket, which stands for all of it.
fn largest_of(bucket: usize) -> u64 {
    if bucket <= 8 {
        return bucket as u64;
    }
    let (octave, quarter) = ((bucket - 9) / 4 + 3, (bucket - 9) % 4);
    (5 + quarter as u64) << (octave - 2)
}

/// For every bucket the index of the anchor that serves it.
#[derive(Debug, Clone)]
pub(crate) struct BucketTable([u16; COUNT]);

/// Sizes of M of a bucket whose times count.
const SAMPLES: u64 = 4;

impl BucketTable {
    /// `anchors` ascend and are not empty. A bucket with an anchor in it is that one's (the last's); any other goes to the
    /// neighbour whose kernel has the least `time` there, of (index, M), or to the nearest in log2 where one has none.
    pub(crate) fn new(anchors: &[u32], time: impl Fn(usize, u32) -> Option<f64>) -> Self {
        Self(std::array::from_fn(|bucket| {
            let above = anchors.partition_point(|&anchor| u64::from(anchor) < largest_of(bucket));
            let best = match (above.checked_sub(1), anchors.get(above)) {
                (_, Some(&anchor)) if u64::from(anchor) == largest_of(bucket) => above,
                (Some(below), _) if bucket_of(anchors[below]) == bucket => below,
                (None, _) => 0,
                (Some(below), None) => below,
                (Some(below), Some(_)) => {
                    let of_both = samples(bucket).and_then(|samples| {
                        let over_bucket = |index| samples.iter().map(|&m| time(index, m)).sum::<Option<f64>>();
                        Some((over_bucket(below)?, over_bucket(above)?))
                    });
                    let here = largest_of(bucket) as f64;
                    let is_nearer = || here * here <= f64::from(anchors[below]) * f64::from(anchors[above]);
                    let takes_below = of_both.map_or_else(is_nearer, |(of_below, of_above)| of_below < of_above);
                    if takes_below { below } else { above }
                }
            };
            u16::try_from(best).unwrap_or(u16::MAX)
        }))
    }

    /// The table of what is tuned or chosen for `problem`, whose M is not used, on a device of this class.
    pub(crate) fn of_choices(device_class: &str, problem: &Problem, choices: &[Choice]) -> Self {
        let anchors: Vec<u32> = choices.iter().map(|choice| choice.anchor).collect();
        let chip = Chip::of_class(device_class);
        Self::new(&anchors, |index, m| {
            let (chip, choice) = (chip.as_ref()?, choices.get(index)?);
            let work = |m| chip.work(&problem.with_m(m), &choice.config);
            Some(choice.median_us? * work(m)? / work(choice.anchor)?)
        })
    }

    /// Index of the anchor that serves `m`.
    pub(crate) fn anchor(&self, m: u32) -> usize {
        self.0.get(bucket_of(m)).copied().unwrap_or(0).into()
    }
}

/// Evenly spread sizes of a bucket; `None` beyond 32 bits.
fn samples(bucket: usize) -> Option<Vec<u32>> {
    let above = largest_of(bucket.checked_sub(1)?);
    let width = largest_of(bucket) - above;
    (1..=SAMPLES).map(|part| u32::try_from(above + (width * part).div_ceil(SAMPLES)).ok()).collect()
}

/// Of the choices for `problem`, ascending by anchor, the one whose kernel a prepared plan launches for the problem's M.
pub fn serving_choice<'a>(device_class: &str, problem: &Problem, choices: &'a [Choice]) -> Option<&'a Choice> {
    choices.get(BucketTable::of_choices(device_class, problem, choices).anchor(problem.m))
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiglu_db::Match;
    use swiglu_kernels::{DType, Target, WeightMajor, arch, families};

    #[test]
    fn buckets_are_in_order_and_end_at_their_largest_m() {
        for m in 1..100_000u32 {
            let bucket = bucket_of(m);
            assert!(u64::from(m) <= largest_of(bucket), "{m}");
            assert!(bucket == 0 || u64::from(m) > largest_of(bucket - 1), "{m}");
        }
        assert_eq!(bucket_of(1 << 31), COUNT - 1);
    }

    const ANCHORS: [u32; 4] = [1, 16, 256, 4096];

    #[test]
    fn the_nearest_anchor_serves_where_nothing_has_a_time() {
        let table = BucketTable::new(&ANCHORS, |_, _| None);
        let served = [1, 3, 5, 16, 60, 80, 256, 1000, 2000, 1 << 30].map(|m| table.anchor(m));
        assert_eq!(served, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]);
    }

    #[test]
    fn between_anchors_the_faster_neighbour_serves() {
        // Tiles of as many rows as the anchor; a tile takes as long as it has rows, and one more.
        let by_tiles = |index: usize, m: u32| Some(f64::from(m.div_ceil(ANCHORS[index]) * (ANCHORS[index] + 1)));
        let table = BucketTable::new(&ANCHORS, by_tiles);
        let served = [1, 4, 10, 16, 17, 60, 224, 241, 256, 1000, 4096, 5000].map(|m| table.anchor(m));
        assert_eq!(served, [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3]);
        let away = BucketTable::new(&ANCHORS, |index, _| Some(index as f64));
        assert_eq!(
            [1, 16, 4096].map(|m| away.anchor(m)),
            [0, 1, 3],
            "an anchor serves its own M, whatever is said of it"
        );
    }

    #[test]
    fn an_anchor_inside_a_bucket_serves_it_whole() {
        let inside = BucketTable::new(&[100, 128], |index, _| Some(1.0 - index as f64));
        assert_eq!([100, 112, 120, 128].map(|m| inside.anchor(m)), [0, 0, 1, 1]);
    }

    #[test]
    fn one_token_more_than_an_anchor_of_few_does_not_double_the_time() {
        let class = "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz";
        let problem = Problem::forward(DType::Bf16, WeightMajor::K, 9, 14336, 4096);
        let arch = arch::by_name("sm_90a").unwrap();
        let rows = |block_m: u32| {
            let legal = families::candidates(&problem, Target::Gpu(arch)).into_iter();
            let mut of_rows = legal.filter(|config| config.launch_shape(&problem).unwrap().block_m == block_m);
            of_rows.next().unwrap()
        };
        let choice = |anchor, block_m, median_us| Choice {
            anchor,
            config: rows(block_m),
            matched: Match::Exact,
            median_us: Some(median_us),
            stand_in: None,
        };
        let choices = [choice(8, 8, 60.0), choice(16, 16, 61.0)];
        assert_eq!(serving_choice(class, &problem, &choices).unwrap().anchor, 16);
        assert_eq!(serving_choice(class, &problem.with_m(8), &choices).unwrap().anchor, 8);
        assert_eq!(serving_choice(class, &problem, &[]), None);
    }
}
