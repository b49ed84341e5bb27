//! The check of Hopper's matrix products and attention before they serve: planted faults are found, the portable kernels take over, and
//! results stay right.
#![cfg(feature = "cuda")]

mod common;

use common::compare::different_bits;
use common::cuda::{ORDERS, Recorder};
use common::gemm::Values;
use common::host_kernels::{project_kernels, project_library, root};
use common::watched::{Fault, Watched};
use lowrank::backend::cuda::{Cuda, Executor, HostExecutor, Properties, ThreadOrder};
use lowrank::backend::{AttentionShape, Backend, Gemm, GemmTerm, Matrix, Sequence};
use lowrank::quant::{Format, QuantConfig};
use lowrank::{DType, Tensor};
use std::process::Command;
use std::sync::Arc;

/// Executors over the project's kernels with a piece of `gemm_hopper.cu` exchanged, of which only the kernels are compiled that
/// such products may ask for.
fn mutant(piece: &str, other: &str, kind: Kind, order: ThreadOrder) -> Arc<Recorder> {
    mutant_of("gemm_hopper.cu", piece, other, order, |text| {
        let first = text.find("GEMMS_HOPPER(gemm_hopper_, PAIR, 128)").expect("the first kernels");
        text.truncate(first);
        text.push_str(&kind.kernels());
    })
}

fn faultless() -> Arc<Recorder> {
    mutant("", "", Kind::Pair, ThreadOrder::Forward)
}

/// The same of any of the kernels' files, of which `shorten` leaves what is needed.
fn mutant_of(
    file: &str,
    piece: &str,
    other: &str,
    order: ThreadOrder,
    shorten: impl FnOnce(&mut String),
) -> Arc<Recorder> {
    let mut kernels = project_kernels();
    if !piece.is_empty() {
        let text = std::fs::read_to_string(root().join("cuda").join(file)).unwrap();
        assert_eq!(text.matches(piece).count(), 1, "{piece:?}");
        let mut text = text.replace(piece, other);
        shorten(&mut text);
        kernels.replacements.push((file.into(), text));
    }
    let library = kernels.build().unwrap_or_else(|message| panic!("{message}"));
    Recorder::new(Arc::new(HostExecutor::open(&library, order).unwrap()), 90)
}

fn random(backend: &Backend, shape: [usize; 2]) -> Tensor {
    let mut values = Values(3);
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| values.value()).collect();
    backend.to_dtype(&backend.from_slice(&values, &shape).unwrap(), DType::BF16).unwrap()
}

/// Products that Hopper's kernels are for: of bf16 by clusters of two by two or of two, of codes, of parts.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Square,
    SquareNn,
    Pair,
    Codes,
    CodesNn,
    Split,
}

impl Kind {
    const ALL: [Kind; 6] =
        [Kind::Square, Kind::SquareNn, Kind::Pair, Kind::Codes, Kind::CodesNn, Kind::Split];

    /// The lines of `gemm_hopper.cu` that make the kernels for such products.
    fn kernels(self) -> String {
        if !matches!(self, Kind::Codes | Kind::CodesNn) {
            let pairs = "GEMMS_BF16(gemm_hopper_, PAIR, 128) GEMMS_BF16(gemm_hopper_, PAIR, 192)";
            let squares = "GEMMS_SQUARE(128) GEMMS_SQUARE(192) GEMMS_SQUARE(208)";
            return format!("{pairs}\n{squares}\nGEMMS_BF16(gemm_hopper_split_, SPLIT, 128)\n");
        }
        let kinds = [
            ("gemm_hopper_", "PAIR", 128),
            ("gemm_hopper_", "PAIR", 192),
            ("gemm_hopper_split_", "SPLIT", 128),
        ];
        let one = |(name, shape, rows), (layout, k_major)| {
            format!("GEMM_HOPPER({name}codes4_{rows}_{layout}, {shape}, {rows}, 4, true, {k_major})\n")
        };
        kinds
            .into_iter()
            .flat_map(|kind| [("nt", true), ("nn", false)].map(|layout| one(kind, layout)))
            .collect()
    }

    fn product(self, backend: &Backend) -> Vec<f32> {
        let (m, n, k) = match self {
            Kind::Split => (104, 96, 1600),
            Kind::Pair => (120, 480, 352),
            _ => (256, 160, 608),
        };
        let transposed = !matches!(self, Kind::CodesNn | Kind::SquareNn);
        let x = random(backend, [m, k]);
        let w = random(backend, if transposed { [n, k] } else { [k, n] });
        let nf4 = QuantConfig::new(Format::by_name("nf4").unwrap());
        let codes = backend.quantize(&w, &nf4).unwrap();
        let b = match self {
            Kind::Codes | Kind::CodesNn => Matrix::Quantized { matrix: &codes, transposed },
            _ => Matrix::Dense { tensor: &w, transposed },
        };
        let mut y = backend.empty(&[m, n], DType::F32).unwrap();
        backend.gemm(&mut y, &Gemm::new(&[GemmTerm { a: Matrix::plain(&x), b }])).unwrap();
        backend.to_f32(&y).unwrap()
    }
}

/// What a kernel with a fault did: whether it serves (not another one for Hopper, which the fault may spare), and the
/// messages of the executor. The result is right.
fn shown(piece: &str, other: &str, kind: Kind, order: ThreadOrder) -> (bool, Vec<String>) {
    let recorder = mutant(piece, other, kind, order);
    let found = kind.product(&Cuda::on(recorder.clone()).unwrap());
    let (kernels, last) = recorder.take();
    let first =
        kernels.iter().find(|kernel| kernel.contains("hopper")).expect("sizes are for Hopper's kernels");
    let portable = kind.product(&Cuda::portable(faultless()).unwrap());
    assert_eq!(different_bits(&found, &portable), 0, "{piece:?} {kind:?}");
    (last == *first, recorder.errors())
}

#[test]
fn faultless_kernels_serve_and_are_asked_once() {
    for kind in Kind::ALL {
        let recorder = faultless();
        let backend = Cuda::on(recorder.clone()).unwrap();
        let first = kind.product(&backend);
        let kernel = recorder.take().1;
        assert!(kernel.contains("hopper"), "{kind:?}: {kernel}");
        assert_eq!(kernel.contains("square"), matches!(kind, Kind::Square | Kind::SquareNn), "{kernel}");
        assert_eq!(kernel.contains("split"), matches!(kind, Kind::Split), "{kernel}");
        let again = kind.product(&backend);
        let (kernels, last) = recorder.take();
        assert!(last.contains("hopper") && kernels.iter().filter(|k| k.contains("gemm")).count() == 1);
        assert_eq!(different_bits(&first, &again), 0);
    }
}

/// What was shown of a fault that did not lead to what it has to: the kernel is refused in every order, or in one at least, and
/// one of its errors has the words, if there are any.
fn missed(piece: &str, other: &str, kind: Kind, every: bool, words: &str) -> Option<String> {
    let shown = ORDERS.map(|order| shown(piece, other, kind, order));
    let refused = shown.iter().filter(|(serves, _)| !serves).count();
    let said = words.is_empty() || shown.iter().flat_map(|(_, errors)| errors).any(|e| e.contains(words));
    let found = refused >= if every { ORDERS.len() } else { 1 } && said;
    (!found).then(|| format!("{piece:?} -> {other:?}: {shown:?}"))
}

#[test]
fn planted_faults_make_the_portable_kernels_serve() {
    let mut faults = Vec::new();
    let mut refused = |piece: &str, other: &str, kind: Kind, every: bool, words: &str| {
        faults.extend(missed(piece, other, kind, every, words));
    };
    // Nobody waits for tiles; the wait for the wrong phase; too few bytes; nobody gives stages back.
    let wait = "            mbarrier_wait(&block.full[stage.slot], stage.parity);\n";
    refused(wait, "", Kind::Pair, true, "");
    refused(wait, &wait.replace("parity)", "parity ^ 1)"), Kind::Square, true, "");
    let wait = "mbarrier_wait(&empty[stage.slot], stage.parity ^ 1);";
    refused(wait, &wait.replace(" ^ 1", ""), Kind::Codes, true, "wait at mbarrier_wait");
    refused(wait, "", Kind::Codes, true, "");
    refused("K::A_BYTES + (codes ?", "K::A_BYTES - 1024 + (codes ?", Kind::Split, true, "");
    let arrive = "if (lane == 0) mbarrier_arrive(&block.empty[slot]);";
    refused(arrive, "", Kind::Split, true, "arrivals and 0 bytes are missing");
    // Stages that are given back while they are read.
    let release = "if (tile > from) release(stage.slot_before(), cut);\n                if (codes)";
    refused(
        release,
        "if (tile > from) release(stage.slot, cut);\n                if (codes)",
        Kind::Codes,
        false,
        "",
    );
    // Parts of the sum that begin with what is there; half of a tile in the wrong place; scales of other lines.
    let multiply =
        "wgmma_advance(b, step * B_STEP), wgmma_advance(a, step * A_STEP), tile > from || step > 0);";
    refused(multiply, &multiply.replace("tile > from || step > 0", "true"), Kind::Pair, true, "");
    refused("row + half * (K::ROWS / 2)", "row + half * (K::ROWS / 2 - 8)", Kind::Pair, true, "");
    // Results that are staged where others are still read, or read before they are there.
    refused("first / CHUNK_ROWS % 2 * CHUNK", "0", Kind::Pair, false, "");
    let sync = "            sync();\n            static_assert";
    refused(sync, &sync.replace("sync();", ""), Kind::Pair, false, "");
    refused(
        "&scales[32 * half + 8 * i + 2 * (lane % 4)]",
        "&scales[32 * half + 8 * i]",
        Kind::CodesNn,
        true,
        "",
    );
    // The bytes of codes that another warp decodes; a low-rank part's columns in their own order.
    refused("even = table(r[i] >> 8 * (warp % 2)", "even = table(r[i] >> 0", Kind::CodesNn, true, "");
    refused("else if constexpr (!K::B_K_MAJOR) gather(fragments);", "", Kind::CodesNn, true, "");
    // Parts joined before they are there, and in another order.
    let join = "SPLIT_COLUMNS + col; });\n        cluster_arrive();\n        cluster_wait();\n";
    refused(join, "SPLIT_COLUMNS + col; });\n", Kind::Split, false, "");
    refused("+ col + j), part);", "+ col + j), part ^ 1);", Kind::Split, true, "");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Plants faults (a piece of the source, another one) that a kernel is refused for, in every order of threads or in one at least.
fn plant_in_squares(faults: &[(&str, &str, Kind, bool)]) {
    let all = faults.iter().filter_map(|(piece, other, kind, every)| missed(piece, other, *kind, *every, ""));
    let missed: Vec<_> = all.collect();
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

/// Who brings what to whom in a cluster of two by two blocks, and who must have given a stage back before.
#[test]
fn planted_faults_of_clusters_of_four_make_the_portable_kernels_serve() {
    let square = Kind::Square;
    plant_in_squares(&[
        // The block with the same columns is not told that a stage was read: it waits for ever. Or that or the one with the same rows
        // is taken for told when somebody else was told twice, and overwrites what is being read.
        ("lane < K::SENDERS", "lane < K::SENDERS - 1", square, true),
        ("(cut ? 0 : lane)", "(cut ? 0 : lane & 1)", square, false),
        ("(cut ? 0 : lane)", "(cut ? 0 : lane & 2)", square, false),
        ("CONSUMERS / 32 * K::SENDERS", "CONSUMERS / 32 * (K::SENDERS - 1)", square, false),
        // Halves to the wrong blocks.
        ("3 << (rank & ~1u)", "5 << rank % 2", square, true),
        ("5 << rank % 2", "3 << (rank & ~1u)", square, true),
        ("5 << rank % 2", "15", square, true),
        // The wrong half of the left operand's tile, and of the right one's, in either layout; to the other half's place.
        ("CUT ? half : rank % 2", "CUT ? half : rank / 2", square, true),
        ("CUT ? half : rank / 2", "CUT ? half : rank % 2", square, true),
        ("own = column + 64 * half", "own = column + 64 * (1 - half)", Kind::SquareNn, true),
        ("b_tile(stage) + half * 64", "b_tile(stage) + (1 - half) * 64", square, true),
        // Another block's tile of the result.
        ("own / 2 * K::ROWS", "own % 2 * K::ROWS", square, true),
    ]);
}

/// The tiles of the blocks in place of the cluster's; another part of its sum; stages given back to others; half of a tile left out;
/// blocks that do not wait for each other.
#[test]
fn planted_faults_of_cut_squares_make_the_portable_kernels_serve() {
    let square = Kind::Square;
    plant_in_squares(&[
        ("own = (tile - p.whole) % 4", "own = rank", square, true),
        ("cut ? parts.begin(rank) : 0", "cut ? parts.begin(0) : 0", square, true),
        ("(cut ? 0 : lane)", "(cut && lane > 2 ? 0 : lane)", square, false),
        ("(CUT ? 2 : 1)", "1", square, true),
        ("if (block.ends_cut())", "if (K::SHAPE == SPLIT)", square, true),
    ]);
}

/// Clusters of four are as many as the device holds at a time; where it holds none, those of two serve. The bits stay.
#[test]
fn clusters_fit_the_device() {
    let run = |fours: usize, columns: usize, order: ThreadOrder| {
        let host = HostExecutor::open(&project_library(), order).unwrap();
        let properties = Properties { multiprocessors: 16, ..host.properties().clone() };
        let recorder = Arc::new(Watched::of(Arc::new(host), properties, Fault::Fours(fours)));
        let backend = Cuda::on(recorder.clone()).unwrap();
        let product = |backend: &Backend| {
            let (x, w) = (random(backend, [384, 512]), random(backend, [columns, 512]));
            let mut y = backend.empty(&[384, columns], DType::F32).unwrap();
            let terms = [GemmTerm { a: Matrix::plain(&x), b: Matrix::transposed(&w) }];
            backend.gemm(&mut y, &Gemm::new(&terms)).unwrap();
            backend.to_f32(&y).unwrap()
        };
        let found = product(&backend);
        let kernel = (recorder.take().1, recorder.last_blocks());
        assert_eq!(different_bits(&found, &product(&Cuda::portable(recorder).unwrap())), 0, "{kernel:?}");
        kernel
    };
    let square = "gemm_hopper_square_bf16_192_nt".to_string();
    assert_eq!(run(usize::MAX, 1536, ThreadOrder::Forward), (square.clone(), 16));
    assert_eq!(run(3, 1536, ThreadOrder::Forward), (square.clone(), 12));
    assert_eq!(run(0, 1536, ThreadOrder::Forward), ("gemm_hopper_bf16_192_nt".to_string(), 16));
    // Of five squares, four at a time, the last one is cut.
    for order in ORDERS {
        assert_eq!(run(usize::MAX, 1280, order), (square.clone(), 16));
    }
}

/// Where the environment says so, nothing but portable kernels run; a miss is one line on stderr.
#[test]
fn what_the_program_says() {
    if let Ok(mode) = std::env::var("LOWRANK_TEST_CHILD") {
        let piece = if mode == "mutant" { "row + half * (K::ROWS / 2)" } else { "" };
        let recorder = mutant(piece, "row", Kind::Pair, ThreadOrder::Forward);
        let backend = Cuda::on(recorder.clone()).unwrap();
        Kind::Pair.product(&backend);
        Kind::Pair.product(&backend);
        let (kernels, _) = recorder.take();
        eprintln!("hopper ran: {}", kernels.iter().any(|kernel| kernel.contains("hopper")));
        return;
    }
    let child = |mode: &str, portable: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "what_the_program_says", "--nocapture"]);
        command.env("LOWRANK_TEST_CHILD", mode).env("LOWRANK_CUDA_PORTABLE", portable);
        String::from_utf8(command.output().unwrap().stderr).unwrap()
    };
    let said = child("mutant", "");
    let warnings: Vec<_> = said.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 1, "{said}");
    for words in
        ["the portable kernels serve for gemm_hopper_bf16_128_nt", "results differ", "the largest is"]
    {
        assert!(warnings[0].contains(words), "{said}");
    }
    assert!(said.contains("hopper ran: true"), "{said}");
    let said = child("faultless", "1");
    assert!(said.contains("hopper ran: false") && !said.contains("warning"), "{said}");
}

/// Nothing runs behind a kernel that does not end, so that is an error, which nobody waits for.
#[test]
fn a_kernel_that_does_not_end_is_an_error() {
    let watched = Arc::new(Watched::on_host(ThreadOrder::Forward, Fault::End));
    let backend = Cuda::on(watched.clone()).unwrap();
    let (x, w) = (random(&backend, [256, 608]), random(&backend, [160, 608]));
    let mut y = backend.empty(&[256, 160], DType::F32).unwrap();
    let b = Matrix::Dense { tensor: &w, transposed: true };
    let error = backend.gemm(&mut y, &Gemm::new(&[GemmTerm { a: Matrix::plain(&x), b }])).unwrap_err();
    for words in ["gemm_hopper_square_bf16_", "has not ended", "LOWRANK_CUDA_PORTABLE=1"] {
        assert!(error.to_string().contains(words), "{error}");
    }
    assert_eq!(error.to_string().lines().count(), 1);
    assert!(watched.take().1.contains("hopper"), "the portable kernels went on");
}

/// Attention of 140 queries: the result, or gradients.
fn attention(backend: &Backend, backward: bool) -> Vec<f32> {
    let [q, k, v] = [random(backend, [140, 128]), random(backend, [140, 64]), random(backend, [140, 64])];
    let shape = AttentionShape {
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 64,
        scale: 0.125,
        window: None,
        softcap: None,
        sequences: &[Sequence { q_start: 0, q_len: 140, k_start: 0, k_len: 140 }],
    };
    let zeros = |cols| backend.zeros(&[140, cols], DType::BF16).unwrap();
    let (mut out, mut dq, mut dk, mut dv) = (zeros(128), zeros(128), zeros(64), zeros(64));
    let mut lse = backend.zeros(&[140, 2], DType::F32).unwrap();
    backend.attention(&mut out, &mut lse, &q, &k, &v, &shape).unwrap();
    if !backward {
        return backend.to_f32(&out).unwrap();
    }
    backend.attention_backward(&mut dq, &mut dk, &mut dv, &q, &q, &k, &v, &out, &lse, &shape).unwrap();
    [dq, dk, dv].map(|x| backend.to_f32(&x).unwrap()).concat()
}

/// Plants faults (a piece of a kernel's source, another one) in a file; nothing in the first. The kernels must be refused, and
/// results stay right.
fn plant_in_attention(file: &str, backward: bool, faults: &[(&str, &str)]) {
    let portable = Cuda::portable(faultless()).unwrap();
    let expected = attention(&portable, backward);
    for (piece, other) in [("", "")].iter().chain(faults) {
        let recorder = mutant_of(file, piece, other, ThreadOrder::Forward, |_| {});
        let found = attention(&Cuda::on(recorder.clone()).unwrap(), backward);
        assert_eq!(different_bits(&found, &expected), 0, "{piece:?}");
        let mut kernels = recorder.take().0;
        let kind = if backward { "attention_backward" } else { "attention" };
        kernels.retain(|kernel| kernel.starts_with(kind));
        assert!(kernels.iter().any(|kernel| kernel.contains("hopper")), "{piece:?}: it was not asked");
        let last = kernels.last().unwrap();
        assert_eq!(last.contains("hopper"), piece.is_empty(), "{piece:?}: {kernels:?}");
    }
}

#[test]
fn planted_faults_of_attention_make_the_portable_kernel_serve() {
    let faults = [
        ("start_rows<D>(", "start_rows<D / 2>("),
        ("left, values, false)", "left, values + 8 * LINE, false)"),
        ("mbarrier_wait(&rings.v_full[slot], parity);", ""),
        ("mbarrier_wait(&empty[slot], count / STAGES % 2 ^ 1);", "(void)empty;"),
        ("count / STAGES % 2 ^ 1", "count / STAGES % 2"),
    ];
    plant_in_attention("attention_hopper.cu", false, &faults);
}

#[test]
fn planted_faults_of_attentions_backward_make_the_portable_kernels_serve() {
    let release = "        wgmma_wait<0>();\n        __syncwarp();\n        if (lane == 0) mbarrier_arrive";
    let faults = [
        // Tiles that nobody waits for, that are overwritten while they are read, that are never given back.
        ("mbarrier_wait(&memory.full[stage.slot], stage.parity);", ""),
        ("mbarrier_wait(&memory.empty[stage.slot], stage.parity ^ 1);", ""),
        (release, &release.replace("lane == 0", "lane == 32")),
        // Products that are read before they are there; a sum that forgets.
        ("        wgmma_wait<1>();\n", ""),
        ("wgmma_wait<OF_KEYS ? 1 : 0>();", ""),
        ("second_left, x2, true)", "second_left, x2, false)"),
        // Scalars of other queries, or that come too late.
        ("at.first + (int)lane + 32 * i", "at.first + (int)lane + 31 * i"),
        ("OF_KEYS ? 1 + 32 : 1", "1"),
        // A pair of keys and values of another warpgroup; what is hidden, and seen.
        ("second_own(memory.own(1, group))", "second_own(memory.own(1, group ^ 1))"),
        ("if (hidden) hide<N>(x, block, rows.place, first);", ""),
    ];
    plant_in_attention("attention_backward_hopper.cu", true, &faults);
}
