//! Which anchor serves which M. Exact up to 8, then four buckets an octave: a table index, no search.
//!
//! Between anchors the nearest one's kernel may be a bad choice: at M = 9 a kernel for 8 tokens reads the weights twice, and at
//! M = 258 that of 256 multiplies nearly empty tiles, while that of 192 has few of them. So of the anchors around that one
//! serves whose kernel should take least: what was measured at its anchor, times what the model says here over what it says
//! there ([`Chip::at_other_m`]).

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

/// Anchors beside the two neighbours that are asked: those within this factor of the bucket's largest M.
const REACH: u64 = 2;

/// Times closer than this factor the model cannot tell apart: the nearest anchor of those serves.
const TIE: f64 = 1.02;

impl BucketTable {
    /// `anchors` ascend and are not empty. A bucket with an anchor in it is that one's (the last's). Any other goes to the nearest
    /// in log2 of those around it whose kernel has the least `time` there, of (index, M), or just the nearest where one of its
    /// neighbours has none.
    pub(crate) fn new(anchors: &[u32], time: impl Fn(usize, u32) -> Option<f64>) -> Self {
        Self(std::array::from_fn(|bucket| {
            let above = anchors.partition_point(|&anchor| u64::from(anchor) < largest_of(bucket));
            let best = match (above.checked_sub(1), anchors.get(above)) {
                (_, Some(&anchor)) if u64::from(anchor) == largest_of(bucket) => above,
                (Some(below), _) if bucket_of(anchors[below]) == bucket => below,
                (None, _) => 0,
                (Some(below), None) => below,
                (Some(below), Some(_)) => {
                    let fast =
                        fast_around(anchors, [below, above], bucket, &time).unwrap_or_else(|| vec![below, above]);
                    let far = |&index: &usize| distance(anchors[index], bucket);
                    fast.into_iter().min_by(|a, b| far(a).total_cmp(&far(b))).unwrap_or(below)
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
            chip.at_other_m(choice.median_us?, &problem.with_m(choice.anchor), &choice.config, m)
        })
    }

    /// Index of the anchor that serves `m`.
    pub(crate) fn anchor(&self, m: u32) -> usize {
        self.0.get(bucket_of(m)).copied().unwrap_or(0).into()
    }
}

/// The anchors within reach of a bucket that nothing beats there by more than the model can tell; `None` where a neighbour has
/// no time.
fn fast_around(
    anchors: &[u32],
    neighbours: [usize; 2],
    bucket: usize,
    time: impl Fn(usize, u32) -> Option<f64>,
) -> Option<Vec<usize>> {
    let (samples, here) = (samples(bucket)?, largest_of(bucket));
    let over_bucket = |index: usize| samples.iter().map(|&m| time(index, m)).sum::<Option<f64>>();
    neighbours.into_iter().try_for_each(|index| over_bucket(index).map(drop))?;
    let in_reach = |anchor: u64| anchor * REACH >= here && anchor <= here * REACH;
    let around = (0..anchors.len()).filter(|index| neighbours.contains(index) || in_reach(anchors[*index].into()));
    let timed: Vec<(f64, usize)> = around.filter_map(|index| Some((over_bucket(index)?, index))).collect();
    let least = timed.iter().map(|(time, _)| *time).fold(f64::INFINITY, f64::min);
    Some(timed.into_iter().filter(|(time, _)| *time <= least * TIE).map(|(_, index)| index).collect())
}

/// How far an anchor is from the middle of a bucket, in log2.
fn distance(anchor: u32, bucket: usize) -> f64 {
    let smallest = bucket.checked_sub(1).map_or(0, largest_of) + 1;
    let log2 = |size: u64| (size.max(1) as f64).log2();
    (2.0 * log2(anchor.into()) - log2(smallest) - log2(largest_of(bucket))).abs()
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
    use swiglu_kernels::families::Schedule;
    use swiglu_kernels::{Config, DType, Target, WeightMajor, arch, families};

    #[test]
    fn buckets_are_in_order_and_end_at_their_largest_m() {
        for m in 1..100_000u32 {
            let bucket = bucket_of(m);
            assert!(u64::from(m) <= largest_of(bucket), "{m}");
            assert!(bucket == 0 || u64::from(m) > largest_of(bucket - 1), "{m}");
        }
        assert_eq!(bucket_of(1 << 31), COUNT - 1);
    }

    const CLASS: &str = "sm_90a-sm132-l2_60m-smem227k-bus6016-mem3201mhz";

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
    fn of_equally_fast_anchors_around_the_nearest_serves() {
        // Neither neighbour of 700, whose bucket ends at 768, but one further on.
        let anchors = [300, 450, 600, 1000, 1400];
        let table = |times: [f64; 5]| BucketTable::new(&anchors, move |index, _| Some(times[index])).anchor(700);
        assert_eq!(table([3.0, 1.0, 3.0, 3.0, 3.0]), 1);
        assert_eq!(table([3.0, 1.0, 3.0, 1.01, 1.0]), 3, "as fast, and nearer");
        assert_eq!(table([1.0, 3.0, 2.0, 3.0, 3.0]), 2, "300 is too far");
        let partly = BucketTable::new(&anchors, |index, _| (index != 2).then_some(index as f64));
        assert_eq!(partly.anchor(700), 2, "a neighbour without a time: the nearest");
    }

    /// K 4096, N 14336, bf16 on an H200, 2026-11-21: the winners around, and which serve where others were measured
    /// (benches/results/2026-11-21-h200-off_anchor.json).
    #[test]
    fn winners_serve_off_their_anchors_as_measured() {
        use Schedule::{Cooperative, Pingpong};
        let shape = Problem::forward(DType::Bf16, WeightMajor::K, 0, 14336, 4096);
        let legal = families::candidates(&shape, Target::Gpu(arch::by_name("sm_90a").unwrap()));
        let choice = |(anchor, us, schedule, tile, cluster_m, consumers)| Choice {
            anchor,
            config: *legal
                .iter()
                .find(|config| match config {
                    Config::WgmmaTma(tma) => {
                        (tma.schedule, [tma.block_m, tma.block_n], tma.cluster_m, tma.consumers, tma.cluster_n)
                            == (schedule, tile, cluster_m, consumers, 1)
                            && (tma.cluster_k, tma.blocks_per_sm) == (1, 1)
                    }
                    _ => false,
                })
                .unwrap(),
            matched: Match::Exact,
            median_us: Some(us),
            stand_in: None,
        };
        let choices = [
            (128, 67.971, Cooperative, [128, 112], 1, 2),
            (192, 96.431, Cooperative, [64, 112], 1, 1),
            (256, 104.34, Pingpong, [128, 56], 2, 2),
            (384, 157.839, Pingpong, [64, 112], 2, 2),
            (512, 189.309, Pingpong, [128, 88], 1, 2),
            (768, 285.977, Pingpong, [128, 96], 1, 2),
            (1024, 361.977, Pingpong, [128, 88], 1, 2),
            (1536, 542.724, Pingpong, [128, 88], 1, 2),
        ]
        .map(choice);
        let served = |m| serving_choice(CLASS, &shape.with_m(m), &choices).unwrap().anchor;
        // 384's kernel took 176 us at 258, 1024's 338 at 781 and 344 at 854; tuned ones 145, 312 and 336.
        assert_eq!([258, 781, 854].map(served), [192, 768, 768]);
        // These were within 3 % of what tuning found there.
        assert_eq!([160, 246, 443, 519, 595, 767, 1413].map(served), [192, 256, 512, 768, 768, 768, 1536]);
    }

    #[test]
    fn an_anchor_inside_a_bucket_serves_it_whole() {
        let inside = BucketTable::new(&[100, 128], |index, _| Some(1.0 - index as f64));
        assert_eq!([100, 112, 120, 128].map(|m| inside.anchor(m)), [0, 0, 1, 1]);
    }

    #[test]
    fn one_token_more_than_an_anchor_of_few_does_not_double_the_time() {
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
        assert_eq!(serving_choice(CLASS, &problem, &choices).unwrap().anchor, 16);
        assert_eq!(serving_choice(CLASS, &problem.with_m(8), &choices).unwrap().anchor, 8);
        assert_eq!(serving_choice(CLASS, &problem, &[]), None);
    }
}
