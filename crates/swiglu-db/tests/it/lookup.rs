//! The ladder, rung by rung.

use crate::fixture::{CLASS, Noise, failed, measured, problem, series, target};
use std::fs;
use swiglu_db::lookup::{LayerError, Rung, default_dir};
use swiglu_db::snapshot::{self, Snapshot, SnapshotError};
use swiglu_db::{Layer, Match, Record, TuningDb, TuningTable, shipped};
use swiglu_kernels::arch;
use swiglu_kernels::families::{Config, Target, candidates};
use swiglu_kernels::problem::{DType, Op, Problem, WeightMajor};

const OTHER_CLASS: &str = "sm_90a-sm114-l2_50m-smem227k-bus5120";

fn table(layers: &[&[Record]]) -> TuningTable {
    TuningTable::from_layers(layers.iter().map(|records| Snapshot::from_records(records).unwrap()).collect())
}

fn at(m: u32, n: u32, k: u32) -> Record {
    measured(CLASS, problem(m, n, k), 1.0)
}

/// What serves, and how near it is.
fn serving(table: &TuningTable, class: &str, problem: &Problem, target: Target) -> (Option<Record>, Match) {
    let answer = table.explain(class, problem, target).serving;
    answer.map_or((None, Match::Untuned), |answer| (Some(answer.record), answer.matched))
}

/// What problem's record serves, and how near it is.
fn find(table: &TuningTable, problem: &Problem) -> (Option<Problem>, Match) {
    let (record, matched) = serving(table, CLASS, problem, target());
    if let Some(record) = &record {
        assert_eq!(record.config.check(problem, target()), Ok(()));
    }
    (record.map(|record| record.problem), matched)
}

#[test]
fn each_rung_is_taken_when_those_above_are_empty() {
    let foreign = measured(OTHER_CLASS, problem(64, 1024, 4096), 1.0);
    let unlike = measured(CLASS, Problem::forward(DType::F16, WeightMajor::K, 64, 1024, 4096), 1.0);
    let other_arch = measured("sm_90-x", problem(64, 1024, 4096), 1.0);
    let asked = problem(64, 1024, 4096);
    let mut known = vec![unlike, other_arch];
    assert_eq!(find(&table(&[&known]), &asked), (None, Match::Untuned));
    for (record, matched) in [
        (foreign, Match::SameArch),
        (at(64, 2048, 4096), Match::NearestShape),
        (at(128, 1024, 4096), Match::NearestM),
        (at(64, 1024, 4096), Match::Exact),
    ] {
        let expected = record.problem;
        known.push(record);
        assert_eq!(find(&table(&[&known]), &asked), (Some(expected), matched));
    }
}

#[test]
fn the_plain_forward_answers_for_the_op_that_saves_until_that_is_tuned() {
    let saving = problem(64, 1024, 4096).with_op(Op::ForwardSave);
    let plain = at(64, 1024, 4096);
    let of_plain = table(&[std::slice::from_ref(&plain)]);
    assert_eq!(find(&of_plain, &saving), (Some(plain.problem), Match::OtherOp));
    let anchors = of_plain.anchors(CLASS, &saving, target());
    assert_eq!(anchors, [(64, plain.clone(), Match::OtherOp)]);
    let of_both = table(&[&[plain, measured(CLASS, saving, 1.0)]]);
    assert_eq!(find(&of_both, &saving), (Some(saving), Match::Exact));
    assert_eq!(find(&table(&[&[]]), &saving), (None, Match::Untuned));
    // Its own record of another shape is further away than the plain forward's of this one.
    let far = measured(CLASS, problem(64, 512, 512).with_op(Op::ForwardSave), 1.0);
    let near = at(64, 1024, 4096);
    let anchors = table(&[&[far, near.clone()]]).anchors(CLASS, &saving, target());
    assert_eq!(anchors, [(64, near, Match::OtherOp)]);
}

#[test]
fn the_plain_ops_answer_for_those_of_static_weights() {
    for (plain, asked) in [(Op::Forward, Op::ForwardStatic), (Op::Down, Op::DownStatic)] {
        let record = measured(CLASS, problem(8, 1024, 4096).with_op(plain), 1.0);
        let asked = record.problem.with_op(asked);
        let anchors = table(&[std::slice::from_ref(&record)]).anchors(CLASS, &asked, target());
        assert_eq!(anchors, [(8, record, Match::OtherOp)]);
    }
}

#[test]
fn nearness_is_measured_in_octaves() {
    let table = table(&[&[at(16, 1024, 4096), at(1024, 1024, 4096), at(1, 65536, 4096), at(8192, 65536, 4096)]]);
    // 100 is 2.6 octaves from 16 and 3.4 from 1024; 200 is 3.6 and 2.4.
    assert_eq!(find(&table, &problem(100, 1024, 4096)), (Some(problem(16, 1024, 4096)), Match::NearestM));
    assert_eq!(find(&table, &problem(200, 1024, 4096)), (Some(problem(1024, 1024, 4096)), Match::NearestM));
    // The shape counts before M; of one shape the nearest M.
    assert_eq!(find(&table, &problem(8192, 2048, 4096)), (Some(problem(1024, 1024, 4096)), Match::NearestShape));
    assert_eq!(find(&table, &problem(2, 32768, 8192)), (Some(problem(1, 65536, 4096)), Match::NearestShape));
    assert_eq!(find(&table, &problem(0, 65536, 4096)), (Some(problem(1, 65536, 4096)), Match::NearestM));
}

#[test]
fn what_cannot_run_the_problem_is_passed_over() {
    // Tuned for 16-byte access; the problem asked is only 2-byte aligned.
    let narrow = problem(64, 1023, 4096);
    assert_eq!(narrow.alignment, 2);
    let wide = Record { problem: Problem { alignment: 16, ..narrow }, ..at(64, 1024, 4096) };
    let legal = measured(CLASS, problem(64, 511, 4096), 1.0);
    let table = table(&[&[wide, legal.clone()]]);
    assert_eq!(find(&table, &narrow), (Some(legal.problem), Match::NearestShape));
}

#[test]
fn a_smaller_alignment_serves_a_larger_one_after_its_equals() {
    let asked = problem(64, 1024, 4096);
    let narrow_problem = Problem { alignment: 4, ..asked };
    let narrow = measured(CLASS, narrow_problem, 1.0);
    let other_m = at(256, 1024, 4096);
    assert_eq!(find(&table(&[std::slice::from_ref(&narrow)]), &asked), (Some(narrow_problem), Match::NearestM));
    assert_eq!(find(&table(&[&[narrow, other_m.clone()]]), &asked), (Some(other_m.problem), Match::NearestM));
}

#[test]
fn an_exact_record_that_is_illegal_on_this_target_is_not_returned() {
    let sm_75 = Target::Gpu(arch::by_name("sm_75").unwrap());
    let table = table(&[&[at(64, 1024, 4096)]]);
    assert_eq!(serving(&table, CLASS, &problem(64, 1024, 4096), sm_75), (None, Match::Untuned));
}

#[test]
fn the_first_layer_wins_and_a_nearer_entry_of_the_second_beats_it() {
    let user = measured(CLASS, problem(64, 1024, 4096), 5.0);
    let shipped = [at(64, 1024, 4096), at(128, 1024, 4096)];
    let table = table(&[std::slice::from_ref(&user), &shipped]);
    assert_eq!(serving(&table, CLASS, &user.problem, target()).0, Some(user));
    let found = serving(&table, CLASS, &problem(128, 1024, 4096), target());
    assert_eq!(found, (Some(shipped[1].clone()), Match::Exact));
}

#[test]
fn cpu_records_answer_for_the_cpu() {
    let cpu = Target::Cpu { threads: 8 };
    let problem = Problem::forward(DType::F32, WeightMajor::K, 64, 1024, 1024);
    let config = candidates(&problem, cpu)[0];
    let of = |config: Config| Record { config, ..measured("cpu-x-8", problem, 1.0) };
    let table = table(&[&[of(config)]]);
    assert_eq!(serving(&table, "cpu-x-8", &problem, cpu).1, Match::Exact);
    let Config::Cpu(tuned) = config else { panic!("{config}") };
    assert_eq!(tuned.threads, 8);
    assert_eq!(serving(&table, "cpu-y-4", &problem, Target::Cpu { threads: 4 }).1, Match::Untuned);
}

#[test]
fn anchors_are_all_m_of_the_shape_or_of_the_nearest() {
    let narrow = Problem { alignment: 4, ..problem(256, 1024, 4096) };
    let user = [at(1, 1024, 4096), at(64, 1024, 4096)];
    let shipped = [at(64, 1024, 4096), measured(CLASS, narrow, 1.0), at(7, 2048, 4096)];
    let table = table(&[&user, &shipped]);
    let of = |n, k| -> Vec<_> {
        let anchors = table.anchors(CLASS, &problem(9, n, k), target());
        anchors.into_iter().map(|(m, record, matched)| (m, record.problem.n, matched)).collect()
    };
    let tuned = [(1, 1024, Match::Exact), (64, 1024, Match::Exact), (256, 1024, Match::NearestM)];
    assert_eq!(of(1024, 4096), tuned);
    assert_eq!(of(1000, 4096), tuned.map(|(m, n, _)| (m, n, Match::NearestShape)));
    assert_eq!(of(4096, 4096), [(7, 2048, Match::NearestShape)]);
    let foreign = table.anchors(OTHER_CLASS, &problem(9, 2048, 4096), target());
    assert_eq!(foreign.iter().map(|anchor| (anchor.0, anchor.2)).collect::<Vec<_>>(), [(7, Match::SameArch)]);
    assert!(table.anchors("sm_80-x", &problem(9, 2048, 4096), target()).is_empty());
}

#[test]
fn the_published_snapshot_is_the_first_layer() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[series(0), failed(CLASS, problem(3, 64, 64))]).unwrap();
    db.publish().unwrap();
    let (table, skipped) = TuningTable::load(&[(Layer::User, dir.path().into())]);
    assert!(skipped.is_empty(), "{skipped:?}");
    assert_eq!(serving(&table, CLASS, &series(0).problem, target()).0, Some(series(0)));
}

#[test]
fn a_bad_snapshot_is_left_out_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(snapshot::FILE_NAME), "garbage").unwrap();
    let (table, skipped) = TuningTable::load(&[(Layer::User, dir.path().into())]);
    assert!(matches!(skipped[..], [LayerError::Snapshot(SnapshotError::Damaged { .. })]), "{skipped:?}");
    let unknown = measured("sm_70-none", problem(1, 64, 64), 1.0);
    assert_eq!(serving(&table, &unknown.device.class, &unknown.problem, target()).1, Match::Untuned);
}

#[test]
fn the_journal_answers_in_place_of_a_damaged_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let mut db = TuningDb::open(dir.path()).unwrap();
    db.insert(&[series(0), series(1)]).unwrap();
    db.publish().unwrap();
    let path = dir.path().join(snapshot::FILE_NAME);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 9]).unwrap();
    let (table, skipped) = TuningTable::load(&[(Layer::User, dir.path().into())]);
    assert!(matches!(skipped[..], [LayerError::FromJournal(SnapshotError::Damaged { .. })]), "{skipped:?}");
    assert_eq!(serving(&table, CLASS, &series(1).problem, target()).0, Some(series(1)));
}

#[test]
fn the_journal_answers_in_place_of_a_missing_or_newer_snapshot_in_every_layer_of_folders() {
    let dir = tempfile::tempdir().unwrap();
    TuningDb::open(dir.path()).unwrap().insert(&[series(0), series(1)]).unwrap();
    let path = dir.path().join(snapshot::FILE_NAME);
    for layer in [Layer::Override, Layer::User, Layer::Site] {
        fs::remove_file(&path).unwrap();
        for (newer, reason) in [(None, "is missing; `swiglu-tune db rebuild`"), (Some("{\"schema\":7}\n"), "schema 7")]
        {
            newer.into_iter().for_each(|text| fs::write(&path, text).unwrap());
            let (table, wrong) = TuningTable::load(&[(layer, dir.path().into())]);
            assert!(matches!(wrong[..], [LayerError::FromJournal(_)]), "{wrong:?}");
            let text = wrong[0].to_string();
            assert!(text.contains(reason) && text.ends_with("its journal answers"), "{text}");
            assert_eq!(serving(&table, CLASS, &series(1).problem, target()).0, Some(series(1)), "{layer}");
        }
    }
}

#[test]
fn a_journal_that_cannot_be_read_is_no_empty_layer() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("journal.jsonl")).unwrap();
    let (_, wrong) = TuningTable::load(&[(Layer::User, dir.path().into())]);
    assert!(
        wrong[0].to_string().contains("cannot read") && wrong[0].to_string().contains("journal.jsonl"),
        "{wrong:?}"
    );
    let below_a_file = tempfile::NamedTempFile::new().unwrap();
    let (_, wrong) = TuningTable::load(&[(Layer::User, below_a_file.path().join("db"))]);
    assert!(wrong[0].to_string().contains("choose another directory"), "{wrong:?}");
}

#[test]
fn one_row_of_a_table_that_cannot_be_read_costs_no_other() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let records = [at(64, 1024, 4096), at(64, 2048, 4096), at(64, 4096, 4096)];
    let text = shipped::export(&records[0].device, &records).unwrap();
    let unknown = text.replacen("family = \"", "family = \"of_tomorrow_", 1);
    let infinite = text.replacen("median_us = 1.0", "median_us = nan", 1);
    let absurd = text.replacen("error = 0.000123", "error = 7.5", 1);
    for (text, reason) in
        [(unknown, "of_tomorrow_"), (infinite, "measurement.median_us"), (absurd, "measurement.error")]
    {
        fs::write(file.path(), text).unwrap();
        let (table, wrong) = TuningTable::load(&[(Layer::Override, file.path().into())]);
        assert_eq!(wrong.len(), 1, "{wrong:?}");
        let why = wrong[0].to_string();
        let named = format!("{}`: 1 of 3 records cannot be read; the first is record 1: ", file.path().display());
        assert!(why.contains(&named) && why.contains(reason), "{why}");
        assert_eq!(table.layers().next(), Some((Layer::Override, 2)));
        assert_eq!(serving(&table, CLASS, &records[2].problem, target()).0.unwrap().problem, records[2].problem);
    }
}

#[test]
fn the_layers_answer_in_their_order_and_each_says_its_name() {
    let [user, site] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let publish = |dir: &tempfile::TempDir, record: Record| {
        let mut db = TuningDb::open(dir.path()).unwrap();
        db.insert(&[record]).unwrap();
        db.publish().unwrap();
    };
    let (asked, records) =
        (problem(64, 1024, 4096), [1.0, 2.0, 3.0].map(|us| measured(CLASS, problem(64, 1024, 4096), us)));
    publish(&user, records[1].clone());
    publish(&site, records[2].clone());
    let table = user.path().join("table.toml");
    fs::write(&table, shipped::export(&records[0].device, &records[..1]).unwrap()).unwrap();
    let places = [(Layer::Override, table), (Layer::User, user.path().into()), (Layer::Site, site.path().into())];
    for (first, layer) in ["override", "user", "site"].into_iter().enumerate() {
        let (loaded, skipped) = TuningTable::load(&places[first..]);
        assert!(skipped.is_empty(), "{skipped:?}");
        let serving = loaded.explain(CLASS, &asked, target()).serving.unwrap();
        let found = (serving.layer.to_string(), serving.record.measurement().unwrap().median_us);
        assert_eq!(found, (layer.to_owned(), (first + 1) as f64));
    }
    let (loaded, _) = TuningTable::load(&places);
    let layers: Vec<_> = loaded.layers().map(|(layer, records)| (layer, records > 0)).collect();
    let all = [Layer::Override, Layer::User, Layer::Site, Layer::Shipped].map(|layer| (layer, true));
    assert_eq!(layers, all);
}

#[test]
fn an_override_that_is_not_there_is_said_and_a_missing_site_is_not() {
    let nowhere = |layer| vec![(layer, "/nowhere/at/all".into())];
    let (_, skipped) = TuningTable::load(&nowhere(Layer::Override));
    assert!(skipped[0].to_string().contains("the override layer `/nowhere/at/all` is not there"), "{skipped:?}");
    assert!(TuningTable::load(&nowhere(Layer::Site)).1.is_empty());
    // A folder that is no database, say the one above it.
    let empty = tempfile::tempdir().unwrap();
    let place = |layer| vec![(layer, empty.path().to_path_buf())];
    let (_, skipped) = TuningTable::load(&place(Layer::Override));
    assert!(skipped[0].to_string().contains("snapshot.tsv` is not there"), "{skipped:?}");
    assert!(TuningTable::load(&place(Layer::User)).1.is_empty());
}

#[test]
fn the_rung_by_which_the_plain_operation_serves_is_explained() {
    let plain = at(64, 1024, 4096);
    let asked = plain.problem.with_op(Op::ForwardSave);
    let explanation = table(&[&[], std::slice::from_ref(&plain)]).explain(CLASS, &asked, target());
    let serving = explanation.serving.unwrap();
    assert_eq!((serving.matched, serving.layer, serving.record), (Match::OtherOp, Layer::Given(2), plain.clone()));
    let rung = explanation.rungs.iter().find(|rung| rung.matched == Match::OtherOp && rung.entries > 0).unwrap();
    assert_eq!((rung.layer, rung.nearest.as_ref()), (Layer::Given(2), Some(&plain)));
}

#[test]
fn the_default_directory_is_named_after_the_project() {
    assert!(default_dir().unwrap().ends_with("swiglu-tune"));
}

#[test]
fn what_serves_is_the_nearest_of_its_rung_and_nothing_is_nearer() {
    let noise = &mut Noise(4);
    let size = |noise: &mut Noise| (1 << noise.below(13), 512 * (1 + noise.below(4) as u32), 1024 << noise.below(3));
    for _ in 0..60 {
        let mut layer = || -> Vec<Record> {
            let record = |_| {
                let (m, n, k) = size(noise);
                let class = if noise.below(4) == 0 { OTHER_CLASS } else { CLASS };
                measured(class, Problem { alignment: 1 << (1 + noise.below(4)), ..problem(m, n, k) }, 1.0)
            };
            (0..12).map(record).collect()
        };
        let (user, shipped) = (layer(), layer());
        let table = table(&[&user, &shipped]);
        let (m, n, k) = size(noise);
        let asked = problem(m, n, k);
        let explained = table.explain(CLASS, &asked, target());
        assert_eq!(explained.rungs.len(), 8);
        if let Some(serving) = &explained.serving {
            let same = |rung: &&Rung| (rung.matched, rung.layer) == (serving.matched, serving.layer);
            assert_eq!(explained.rungs.iter().find(same).unwrap().nearest.as_ref(), Some(&serving.record));
            let mut nearer = explained.rungs.iter().filter(|rung| rung.matched < serving.matched);
            assert!(nearer.all(|rung| rung.nearest.is_none()), "{explained:?}");
            assert!(explained.second.is_none_or(|second| second.matched >= serving.matched));
        }
    }
}

#[test]
fn a_rung_says_how_many_it_passed_over_and_why() {
    let asked = problem(64, 1023, 4096);
    let wide = Record { problem: Problem { alignment: 16, ..asked }, ..at(64, 1024, 4096) };
    let legal = measured(CLASS, problem(64, 511, 4096), 1.0);
    let explained = table(&[&[wide, legal.clone()]]).explain(CLASS, &asked, target());
    let near_m = &explained.rungs[1];
    assert_eq!((near_m.matched, near_m.entries, near_m.passed_over), (Match::NearestM, 1, 1));
    assert!(near_m.reason.as_ref().unwrap().starts_with("not legal here: operands are aligned"), "{near_m:?}");
    assert_eq!((explained.serving.unwrap().record, explained.second), (legal, None));
}

#[test]
fn what_stands_in_is_legal_for_the_op_that_was_asked() {
    let (name, text) = shipped::TABLES.iter().find(|(name, _)| *name == "nvidia-h200.toml").unwrap();
    let records = shipped::parse(name.as_ref(), text).unwrap();
    let of_saving = |record: &Record| record.problem.with_op(Op::ForwardSave);
    let is_legal = |record: &&Record| record.config.check(&of_saving(record), target()).is_ok();
    let mut plain = records.iter().filter(|record| record.problem.op == Op::Forward);
    let illegal = plain.clone().find(|record| !is_legal(record)).unwrap();
    let shape = |record: &Record| (record.problem.n, record.problem.k, record.problem.dtype);
    let legal = plain.find(|record| shape(record) == shape(illegal) && is_legal(record)).unwrap();
    let (asked, table) = (of_saving(illegal), table(&[&[illegal.clone(), legal.clone()]]));
    let class = &illegal.device.class;
    assert_eq!(serving(&table, class, &asked, target()), (Some(legal.clone()), Match::OtherOp));
    assert_eq!(table.anchors(class, &asked, target()), [(legal.problem.m, legal.clone(), Match::OtherOp)]);
}

/// As in a plan.
#[test]
fn what_stands_in_goes_before_another_shape_of_the_ops_own_and_after_it_where_it_is_of_another_shape_too() {
    let asked = problem(64, 1024, 4096).with_op(Op::ForwardSave);
    let own = measured(CLASS, problem(64, 2048, 4096).with_op(Op::ForwardSave), 1.0);
    let (plain, far) = (at(64, 1024, 4096), at(64, 1024, 2048));
    for (other, expected) in [(&plain, (&plain, Match::OtherOp)), (&far, (&own, Match::NearestShape))] {
        let table = table(&[&[own.clone(), other.clone()]]);
        let explained = table.explain(CLASS, &asked, target());
        let (serving, second) = (explained.serving.unwrap(), explained.second.unwrap());
        assert_eq!((&serving.record, serving.matched), expected);
        assert_ne!(serving.record, second.record);
        let anchors = table.anchors(CLASS, &asked, target());
        assert_eq!(anchors, [(64, serving.record, serving.matched)]);
        let order: Vec<Match> = explained.rungs.iter().map(|rung| rung.matched).collect();
        assert!(order.is_sorted(), "{order:?}");
    }
}

#[test]
fn a_saving_op_takes_the_plain_forwards_anchors_where_it_has_none_of_its_own() {
    let plain: Vec<Record> = [1, 64, 2048].map(|m| at(m, 1024, 4096)).to_vec();
    let asked = problem(2048, 1024, 4096).with_op(Op::ForwardSave);
    let own = Record { problem: asked, ..at(2048, 1024, 4096) };
    let table = table(&[&[&plain[..], &[own]].concat()]);
    let found = table.anchors(CLASS, &asked, target());
    let matched: Vec<(u32, Match)> = found.iter().map(|(m, _, matched)| (*m, *matched)).collect();
    assert_eq!(matched, [(1, Match::OtherOp), (64, Match::OtherOp), (2048, Match::Exact)]);
}
