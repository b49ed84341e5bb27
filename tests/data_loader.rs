//! Which sequences make up each optimizer step: complete epochs, the same order from the same seed, packing
//! that loses and mixes nothing, and going on from any place exactly.

use lowrank::data::{Example, Loader, LoaderConfig, sequential_batches};
use lowrank::model::Batch;
use proptest::prelude::*;

/// Sequences of these lengths; token ids say whose they are, labels leave out the first token.
fn examples(lengths: &[usize]) -> Vec<Example> {
    let example = |(i, &n): (usize, &usize)| Example {
        input_ids: (0..n as u32).map(|t| i as u32 * 1000 + t).collect(),
        labels: (0..n as i32).map(|t| if t == 0 { -100 } else { i as i32 * 1000 + t }).collect(),
    };
    lengths.iter().enumerate().map(example).collect()
}

fn config(batch: usize, accumulation: usize) -> LoaderConfig {
    LoaderConfig {
        per_device_train_batch_size: batch,
        gradient_accumulation_steps: accumulation,
        ..LoaderConfig::default()
    }
}

/// The indices of the sequences in a batch, in order.
fn members(batch: &Batch) -> Vec<usize> {
    let mut start = 0;
    let mut out = Vec::new();
    for length in &batch.lengths {
        out.push(batch.input_ids[start] as usize / 1000);
        start += length;
    }
    out
}

fn epoch(loader: &mut Loader) -> Vec<Vec<Batch>> {
    (0..loader.steps_per_epoch()).map(|_| loader.next_step()).collect()
}

#[test]
fn targets_are_shifted_within_each_sequence() {
    let loader =
        &mut Loader::new(examples(&[3, 2]), LoaderConfig { shuffle: false, ..config(2, 1) }, 1).unwrap();
    let step = loader.next_step();
    let expected = Batch {
        input_ids: vec![0, 1, 2, 1000, 1001],
        positions: vec![0, 1, 2, 0, 1],
        targets: vec![1, 2, -100, 1001, -100],
        lengths: vec![3, 2],
        first_labels: vec![-100, -100],
    };
    assert_eq!(step, [expected]);
    assert_eq!(step[0].counted(), 3);
    assert_eq!(sequential_batches(&examples(&[3, 2]), 2).collect::<Vec<_>>(), step);
}

#[test]
fn steps_have_the_shape_of_the_trainers_of_hugging_face() {
    let mut loader = Loader::new(examples(&[2; 11]), config(2, 3), 1).unwrap();
    assert_eq!(loader.steps_per_epoch(), 2);
    let shapes: Vec<Vec<usize>> =
        epoch(&mut loader).iter().map(|s| s.iter().map(|b| b.lengths.len()).collect()).collect();
    assert_eq!(shapes, [vec![2, 2, 2], vec![2, 2, 1]]);
    assert!(loader.at_epoch_end());
    assert_eq!(loader.epoch(), 1.0);
    loader.next_step();
    assert_eq!(loader.epoch(), 1.5);
}

#[test]
fn the_order_follows_from_seed_and_epoch() {
    let orders = |seed: u64| -> Vec<Vec<usize>> {
        let mut loader = Loader::new(examples(&[1; 20]), config(3, 2), seed).unwrap();
        (0..2).map(|_| epoch(&mut loader).concat().iter().flat_map(members).collect()).collect()
    };
    let [first, second]: [Vec<usize>; 2] = orders(7).try_into().unwrap();
    assert_eq!(orders(7), [first.clone(), second.clone()]);
    assert_ne!(orders(8)[0], first);
    assert_ne!(first, second);
    let fixed = LoaderConfig { shuffle: false, ..config(3, 2) };
    let mut loader = Loader::new(examples(&[1; 20]), fixed, 7).unwrap();
    let order: Vec<usize> = epoch(&mut loader).concat().iter().flat_map(members).collect();
    assert_eq!(order, (0..20).collect::<Vec<_>>());
}

#[test]
fn shuffling_is_even() {
    let n = 4;
    let mut counts = vec![[0_u32; 4]; n];
    for seed in 0..4000 {
        let mut loader = Loader::new(examples(&[1; 4]), config(4, 1), seed).unwrap();
        for (place, member) in members(&loader.next_step()[0]).into_iter().enumerate() {
            counts[place][member] += 1;
        }
    }
    // Each count is binomial with mean 1000 and standard deviation 27.4: four of them, over 16 counts.
    assert!(counts.iter().flatten().all(|c| c.abs_diff(1000) < 110), "{counts:?}");
}

#[test]
fn grouping_by_length_sorts_within_groups_and_puts_the_longest_first() {
    let lengths: Vec<usize> = (0..64).map(|i| 1 + (i * 37) % 64).collect();
    let grouped = LoaderConfig { group_by_length: true, ..config(2, 2) };
    let mut loader = Loader::new(examples(&lengths), grouped, 3).unwrap();
    let steps = epoch(&mut loader);
    assert_eq!(steps[0][0].lengths[0], 64);
    let all: Vec<usize> = steps.concat().iter().flat_map(|b| b.lengths.clone()).collect();
    // Four groups of 16, each sorted but for the head that the longest was swapped with.
    for group in all.chunks(16) {
        assert!(group[1..].is_sorted_by(|a, b| a >= b), "{group:?}");
    }
    assert!(!all.is_sorted_by(|a, b| a >= b));
}

#[test]
fn a_loader_needs_examples_and_positive_sizes() {
    let message = |examples, config| Loader::new(examples, config, 1).unwrap_err().to_string();
    assert!(message(vec![], config(1, 1)).contains("`examples`: expected at least 1"));
    assert!(message(examples(&[1]), config(0, 1)).contains("`per_device_train_batch_size`"));
    assert!(message(examples(&[1]), config(1, 0)).contains("`gradient_accumulation_steps`"));
}

#[test]
fn a_state_of_other_data_or_settings_is_refused() {
    let loader = Loader::new(examples(&[2, 3]), config(1, 1), 1).unwrap();
    let others = [
        Loader::new(examples(&[3, 2]), config(1, 1), 1).unwrap(),
        Loader::new(examples(&[2, 3]), config(2, 1), 1).unwrap(),
        Loader::new(examples(&[2, 3]), LoaderConfig { packing: Some(5), ..config(1, 1) }, 1).unwrap(),
        Loader::new(examples(&[2, 3]), config(1, 1), 2).unwrap(),
    ];
    for mut other in others {
        assert!(other.restore(loader.state()).unwrap_err().to_string().contains("other training data"));
    }
    let mut beyond = loader.state().clone();
    beyond.position = 3;
    assert!(loader.clone().restore(&beyond).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn an_epoch_holds_each_sequence_once_and_resumes_anywhere(
        lengths in prop::collection::vec(1..12usize, 1..40),
        batch in 1..4usize,
        accumulation in 1..4usize,
        flags in 0..8u8,
        stop in 0..30usize,
    ) {
        let config = LoaderConfig {
            shuffle: flags & 1 == 0,
            group_by_length: flags & 2 != 0,
            packing: (flags & 4 != 0).then_some(12),
            ..config(batch, accumulation)
        };
        let mut loader = Loader::new(examples(&lengths), config.clone(), 5).unwrap();
        let longest = loader.max_batch_tokens();
        let steps = epoch(&mut loader);
        let mut seen: Vec<usize> = steps.concat().iter().flat_map(members).collect();
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
        for batch in steps.concat() {
            prop_assert!(batch.tokens() <= longest);
            // Whole sequences with their own positions and shifted targets, however rows are packed.
            let mut expected = Batch::new();
            let all = examples(&lengths);
            for i in members(&batch) {
                expected.push(&all[i].input_ids, &all[i].labels);
            }
            prop_assert_eq!(batch, expected);
        }

        let mut one = Loader::new(examples(&lengths), config.clone(), 5).unwrap();
        for _ in 0..stop {
            one.next_step();
        }
        let state = serde_json::from_str(&serde_json::to_string(one.state()).unwrap()).unwrap();
        let mut two = Loader::new(examples(&lengths), config, 5).unwrap();
        two.restore(&state).unwrap();
        for _ in 0..20 {
            prop_assert_eq!(one.next_step(), two.next_step());
            prop_assert_eq!(one.state(), two.state());
            prop_assert_eq!(one.epoch().to_bits(), two.epoch().to_bits());
        }
    }

    #[test]
    fn packed_rows_stay_within_their_length(lengths in prop::collection::vec(1..12usize, 1..60)) {
        let config = LoaderConfig { packing: Some(12), ..config(1, 1) };
        let mut loader = Loader::new(examples(&lengths), config, 5).unwrap();
        let rows = epoch(&mut loader);
        prop_assert!(rows.iter().all(|step| step[0].tokens() <= 12));
        // First fit leaves at most one row half empty.
        prop_assert!(rows.iter().filter(|step| step[0].tokens() <= 6).count() <= 1);
    }
}
