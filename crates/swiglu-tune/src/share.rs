//! How the problems of one device class are shared out between the workers that have such a device.

use std::collections::VecDeque;

/// A problem: the number of its group, and of its M in the group.
pub(crate) type Item = (usize, usize);

/// What is left to be done.
#[derive(Debug)]
pub(crate) struct Share {
    groups: Vec<Pending>,
}

#[derive(Debug)]
struct Pending {
    /// Ascending, since what is slow at one M is not tried at the next.
    left: VecDeque<usize>,
    /// Whether its kernels are compiled.
    ready: bool,
    /// The worker that has begun it, and so has its kernels loaded.
    owner: Option<usize>,
}

impl Share {
    /// Groups with so many problems each.
    pub(crate) fn new(sizes: impl IntoIterator<Item = usize>) -> Self {
        let pending = |size| Pending { left: (0..size).collect(), ready: false, owner: None };
        Self { groups: sizes.into_iter().map(pending).collect() }
    }

    /// The kernels of `group` are there.
    pub(crate) fn set_ready(&mut self, group: usize) {
        if let Some(pending) = self.groups.get_mut(group) {
            pending.ready = true;
        }
    }

    /// What `worker` does next: of its own group, else of the first that nobody has, else the last problem of the group
    /// with the most left. `None` while nothing is ready.
    pub(crate) fn next(&mut self, worker: usize) -> Option<Item> {
        let open = |pending: &Pending| pending.ready && !pending.left.is_empty();
        let first = |owner| self.groups.iter().position(|pending| open(pending) && pending.owner == owner);
        if let Some(group) = first(Some(worker)).or_else(|| first(None)) {
            let pending = self.groups.get_mut(group)?;
            pending.owner = Some(worker);
            return Some((group, pending.left.pop_front()?));
        }
        let most = self.groups.iter_mut().enumerate().filter(|(_, pending)| open(pending));
        let (group, pending) = most.max_by_key(|(_, pending)| pending.left.len())?;
        Some((group, pending.left.pop_back()?))
    }

    /// Leaves an item that was taken to another worker.
    pub(crate) fn give_back(&mut self, (group, problem): Item) {
        if let Some(pending) = self.groups.get_mut(group) {
            pending.left.push_front(problem);
            pending.owner = None;
        }
    }

    /// Problems that nobody has taken.
    pub(crate) fn left(&self) -> usize {
        self.groups.iter().map(|pending| pending.left.len()).sum()
    }

    /// Groups that are ready and that nobody has begun.
    pub(crate) fn waiting(&self) -> usize {
        self.groups
            .iter()
            .filter(|pending| pending.ready && pending.owner.is_none() && !pending.left.is_empty())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn ready(sizes: &[usize]) -> Share {
        let mut share = Share::new(sizes.iter().copied());
        (0..sizes.len()).for_each(|group| share.set_ready(group));
        share
    }

    #[test]
    fn what_is_given_back_is_the_next_for_whoever_asks() {
        let mut share = ready(&[2]);
        let first = share.next(0).unwrap();
        share.give_back(first);
        assert_eq!((share.left(), share.next(1)), (2, Some(first)));
    }

    #[test]
    fn one_worker_goes_through_all_in_order() {
        let mut share = ready(&[2, 1, 2]);
        let done: Vec<Item> = std::iter::from_fn(|| share.next(0)).collect();
        assert_eq!(done, [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]);
        assert_eq!(share.left(), 0);
    }

    #[test]
    fn nothing_is_given_out_before_it_is_compiled() {
        let mut share = Share::new([2, 2]);
        assert_eq!((share.next(0), share.left()), (None, 4));
        share.set_ready(1);
        assert_eq!((share.waiting(), share.next(0), share.waiting()), (1, Some((1, 0)), 0));
    }

    #[test]
    fn whatever_the_pace_of_the_workers_each_problem_is_done_once_and_all_are_busy_until_the_end() {
        for paces in [[1, 1, 1, 1], [1, 2, 3, 4], [1, 1, 1, 50]] {
            let sizes = [14, 1, 6, 14, 3];
            let mut share = ready(&sizes);
            let mut seen = BTreeSet::new();
            let mut free_at = [0u32; 4];
            while let Some(worker) = (0..4).min_by_key(|&worker| free_at[worker]) {
                let Some(item) = share.next(worker) else { break };
                assert!(seen.insert(item), "{item:?} twice");
                free_at[worker] += paces[worker];
            }
            assert_eq!(seen.len(), sizes.iter().sum::<usize>());
            let (first, last) = (free_at.iter().min().unwrap(), free_at.iter().max().unwrap());
            assert!(last - first <= *paces.iter().max().unwrap(), "{free_at:?}");
        }
    }

    #[test]
    fn who_helps_takes_the_largest_m_and_the_owner_goes_on_from_the_smallest() {
        let mut share = ready(&[4]);
        let done = [0, 1, 0, 1].map(|worker| share.next(worker).unwrap().1);
        assert_eq!(done, [0, 3, 1, 2]);
    }
}
