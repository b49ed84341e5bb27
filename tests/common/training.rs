//! Forward and backward passes of tiny models, with what they leave as bits.

use super::golden::path;
use lowrank::DType;
use lowrank::adapter::{Bias, InitLoraWeights, TargetModules};
use lowrank::adapter::{Full, LoraConfig, Method, from_settings};
use lowrank::autograd::Dropout;
use lowrank::backend::Backend;
use lowrank::model::{Batch, Model};
use lowrank::rng::{Philox, PhiloxKey, Stream};

/// Which parameters are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trained {
    /// A LoRA adapter on all linear layers, B not zero, with dropout and the model's biases.
    Lora,
    /// Everything.
    Full,
    /// One of [`METHOD_SETTINGS`].
    Method(&'static str),
}

/// An adapter on the output head, with dropout.
pub const HEAD_SETTINGS: &str = r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": ".*(q_proj|c_attn|qkv_proj|lm_head)"}"#;

/// Adapters on the embeddings and the output head.
pub const EMBEDDING_SETTINGS: &str = r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "target_modules": ".*(embed_tokens|wte|wpe|q_proj|c_attn|qkv_proj|lm_head)"}"#;

/// Settings of every method, as on the command line.
pub const METHOD_SETTINGS: [&str; 23] = [
    r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1}"#,
    r#"{"peft_type": "LORA", "r": 4, "lora_dropout": 0.1, "use_dora": true, "target_modules": "all-linear"}"#,
    r#"{"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"}"#,
    r#"{"peft_type": "LORA", "r": 4, "init_lora_weights": "olora", "lora_dropout": 0.1}"#,
    HEAD_SETTINGS,
    EMBEDDING_SETTINGS,
    r#"{"peft_type": "LORA", "r": 4, "use_dora": true, "target_modules": ".*(embed_tokens|wte|wpe|v_proj|c_proj)"}"#,
    r#"{"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2, "lora_dropout": 0.1}"#,
    r#"{"peft_type": "OFT", "oft_block_size": 8, "module_dropout": 0.3, "target_modules": "all-linear"}"#,
    r#"{"peft_type": "OFT", "r": 4, "use_cayley_neumann": false, "coft": true, "eps": 0.5}"#,
    r#"{"peft_type": "OFT", "oft_block_size": 4, "block_share": true, "target_modules": "all-linear"}"#,
    r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5}"#,
    r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 5, "prefix_projection": true, "encoder_hidden_size": 7}"#,
    r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5}"#,
    r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "prompt_tuning_init": "SAMPLE_VOCAB"}"#,
    r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 6}"#,
    r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 5, "encoder_hidden_size": 6, "encoder_dropout": 0.2, "encoder_reparameterization_type": "LSTM"}"#,
    r#"{"peft_type": "IA3"}"#,
    r#"{"peft_type": "VERA", "r": 6, "vera_dropout": 0.1}"#,
    r#"{"peft_type": "LN_TUNING"}"#,
    r#"{"peft_type": "BOTTLENECK", "reduction_factor": 4, "dropout": 0.1}"#,
    r#"{"peft_type": "BOTTLENECK", "adapter_config": "houlsby", "ln_before": true, "ln_after": true}"#,
    r#"{"peft_type": "BOTTLENECK", "adapter_config": "par_bn", "non_linearity": "gelu"}"#,
];

/// The method of these settings.
pub fn method(settings: &str) -> Box<dyn Method> {
    from_settings("test", &serde_json::from_str(settings).unwrap()).unwrap()
}

/// Moves every parameter from where it starts, so that none has zero gradients.
pub fn move_all(model: &mut Model) {
    for id in model.params.ids() {
        let values = model.params.to_vec(id).unwrap();
        let moved: Vec<f32> =
            values.iter().enumerate().map(|(i, v)| v + 0.1 * (i as f32 * 0.37).sin()).collect();
        model.params.set(id, &moved).unwrap();
    }
}

/// A golden family's model with trainable parameters.
pub fn trainable(family: &str, backend: &Backend, dtype: DType, trained: Trained) -> Model {
    let mut model = Model::load(&path(family), backend, dtype).unwrap();
    match trained {
        Trained::Lora => {
            let mut config = LoraConfig {
                r: 5,
                lora_alpha: 10.0,
                lora_dropout: 0.2,
                bias: Bias::All,
                targets: TargetModules::AllLinear.into(),
                init_lora_weights: InitLoraWeights::Random,
                ..LoraConfig::default()
            };
            config.attach(&mut model, 11).unwrap();
        }
        Trained::Full => Full.attach(&mut model, 0).unwrap(),
        Trained::Method(settings) => {
            method(settings).attach(&mut model, 11).unwrap();
            move_all(&mut model);
        }
    }
    model
}

/// Random sequences of these lengths over a vocabulary of 97, each a batch of its own; every third token
/// does not count.
pub fn sequences(lengths: &[usize]) -> Vec<Batch> {
    let mut rng = Philox::new(PhiloxKey::new(5, Stream::Dummy, 1));
    lengths
        .iter()
        .map(|len| {
            let ids: Vec<u32> = (0..*len).map(|_| rng.below(97)).collect();
            let label = |(i, id): (usize, &u32)| if i % 3 == 0 { -100 } else { *id as i32 };
            let labels: Vec<i32> = ids.iter().enumerate().map(label).collect();
            let mut batch = Batch::new();
            batch.push(&ids, &labels);
            batch
        })
        .collect()
}

/// The batches' sequences in one batch.
pub fn joined(batches: &[Batch]) -> Batch {
    let mut all = Batch::new();
    for batch in batches {
        all.input_ids.extend(&batch.input_ids);
        all.positions.extend(&batch.positions);
        all.targets.extend(&batch.targets);
        all.lengths.extend(&batch.lengths);
        all.first_labels.extend(&batch.first_labels);
    }
    all
}

/// The bits of a tensor's elements.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// What a step over micro-batches left.
#[derive(Debug, PartialEq)]
pub struct Step {
    pub losses: Vec<u32>,
    pub gradients: Vec<(String, Vec<u32>)>,
}

impl Step {
    /// Forward and backward over the micro-batches of one step.
    pub fn run(model: &mut Model, batches: &[Batch]) -> Self {
        model.params.zero_grads().unwrap();
        let counted: usize = batches.iter().map(|batch| model.counted(batch)).sum();
        let (mut losses, mut first_row) = (Vec::new(), 0);
        for batch in batches {
            let dropout = Dropout { seed: 1, step: 3, first_row };
            let tensor = model.train_step(batch, 1.0 / counted as f32, Some(dropout)).unwrap();
            losses.extend(bits(&model.backend.to_vec::<f32>(&tensor).unwrap()));
            first_row += batch.tokens();
        }
        assert_eq!(losses.len(), counted);
        let gradients = model.params.ids().map(|id| {
            let values = model.backend.to_vec::<f32>(&model.params.grad(id).unwrap()).unwrap();
            let name = model.params.info(id).name.clone();
            assert!(values.iter().any(|v| *v != 0.0), "{name} has no gradient");
            (name, bits(&values))
        });
        Step { losses, gradients: gradients.collect() }
    }

    /// Fails at the first difference.
    pub fn assert_same(&self, other: &Step, what: &str) {
        assert!(self.losses == other.losses, "{what}: losses differ");
        assert_eq!(self.gradients.len(), other.gradients.len());
        for ((name, a), (_, b)) in self.gradients.iter().zip(&other.gradients) {
            let different = a.iter().zip(b).filter(|(a, b)| a != b).count();
            assert!(different == 0, "{what}: {different} of {} gradients of {name} differ", a.len());
        }
    }
}
