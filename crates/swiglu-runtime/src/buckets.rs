//! Which anchor serves which M. Exact up to 8, then four buckets an octave: a table index, no search.

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

/// For every bucket the index of the anchor nearest in log2; `anchors` ascend and are not empty.
#[derive(Debug, Clone)]
pub(crate) struct BucketTable([u16; COUNT]);

impl BucketTable {
    pub(crate) fn new(anchors: &[u32]) -> Self {
        let log2 = |m: f64| m.max(1.0).log2();
        Self(std::array::from_fn(|bucket| {
            let here = log2(largest_of(bucket) as f64);
            let distance = |anchor: u32| (log2(f64::from(anchor)) - here).abs();
            let nearest = (0..anchors.len()).min_by(|&a, &b| distance(anchors[a]).total_cmp(&distance(anchors[b])));
            u16::try_from(nearest.unwrap_or(0)).unwrap_or(u16::MAX)
        }))
    }

    /// Index of the anchor that serves `m`.
    pub(crate) fn anchor(&self, m: u32) -> usize {
        self.0.get(bucket_of(m)).copied().unwrap_or(0).into()
    }
}

/// Of the tuned values of M, ascending, the one whose kernel a prepared plan launches for `m`.
pub fn serving_anchor(anchors: &[u32], m: u32) -> Option<u32> {
    anchors.get(BucketTable::new(anchors).anchor(m)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_end_at_their_largest_m() {
        for m in 1..100_000u32 {
            let bucket = bucket_of(m);
            assert!(u64::from(m) <= largest_of(bucket), "{m}");
            assert!(bucket == 0 || u64::from(m) > largest_of(bucket - 1), "{m}");
        }
        assert_eq!(bucket_of(1 << 31), COUNT - 1);
    }

    #[test]
    fn the_nearest_anchor_serves() {
        let table = BucketTable::new(&[1, 16, 256, 4096]);
        let served = [1, 3, 5, 16, 60, 80, 256, 1000, 2000, 1 << 30].map(|m| table.anchor(m));
        assert_eq!(served, [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]);
        assert_eq!((serving_anchor(&[1, 16, 256, 4096], 60), serving_anchor(&[], 60)), (Some(16), None));
    }
}
