//! bitsandbytes' four-bit tensors in safetensors files.
//!
//! A matrix `W` is `W` (codes, u8 `[n / 2, 1]`), `W.absmax` (f32, or u8 with double quantization),
//! `W.quant_map` (the 16 levels), with double quantization `W.nested_absmax` and `W.nested_quant_map`, and
//! `W.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON text as bytes. Source: `QuantState.as_dict` of
//! bitsandbytes 0.50.2.

use super::checkpoint::Checkpoint;
use crate::backend::Backend;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::quant::double_quant::NESTED_BLOCKSIZE;
use crate::quant::{Format, QuantConfig, Quantized, Scales};
use crate::tensor::Tensor;
use serde_json::{Map, Value, json};

/// Formats that have this form.
pub const FORMATS: [&str; 2] = ["nf4", "fp4"];

const STATE: &str = "quant_state.bitsandbytes__";

/// What torch calls an element type.
pub(super) fn torch_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// Whether the file has the matrix `name` in this form.
pub fn is_quantized(checkpoint: &Checkpoint, name: &str) -> bool {
    FORMATS.iter().any(|f| checkpoint.contains(&format!("{name}.{STATE}{f}")))
}

/// Reads the matrix `name`; its codes and constants stay in the mapped file where the backend reads
/// that.
///
/// # Errors
/// When a part is missing, has another type or size than the state says, or the state is not what
/// bitsandbytes writes.
pub fn read(checkpoint: &Checkpoint, name: &str, backend: &Backend) -> Result<Quantized> {
    let Some(format) = FORMATS.iter().find(|f| checkpoint.contains(&format!("{name}.{STATE}{f}"))) else {
        return Err(Error::tensor(name, "expected bitsandbytes' quant_state beside it, found none"));
    };
    let state_name = format!("{name}.{STATE}{format}");
    let state = State { values: state_json(checkpoint, &state_name, backend)?, name: state_name };
    let format = Format::by_name(format)?;
    state.expect("quant_type", &json!(format.name))?;
    let part = |suffix: &str| backend.place(&checkpoint.tensor(&format!("{name}.{suffix}"))?);
    let floats = |suffix: &str| -> Result<Vec<f32>> { backend.to_f32(&part(suffix)?) };
    let stored_levels = floats("quant_map")?;
    if format.levels().is_some_and(|levels| stored_levels != *levels) {
        return Err(Error::tensor(
            format!("{name}.quant_map"),
            format!("these are not the levels of {}", format.name),
        ));
    }
    let nested = state.values.contains_key("nested_blocksize");
    let config = QuantConfig {
        blocksize: state.number("blocksize")?,
        double_quant: nested,
        ..QuantConfig::new(format)
    };
    let scales = if nested {
        state.expect("nested_blocksize", &json!(NESTED_BLOCKSIZE))?;
        state.expect("nested_dtype", &json!("float32"))?;
        let offset = state.values.get("nested_offset").and_then(Value::as_f64);
        let offset =
            offset.filter(|x| x.is_finite()).ok_or_else(|| state.bad("nested_offset", "a number"))?;
        Scales::Nested {
            codes: part("absmax")?,
            absmax: part("nested_absmax")?,
            map: part("nested_quant_map")?,
            offset: offset as f32,
        }
    } else {
        Scales::Plain(part("absmax")?)
    };
    let codes = backend.place(&checkpoint.raw(name)?)?;
    Quantized::new(config, state.shape()?, codes, scales, None, state.dtype()?)
        .map_err(|e| Error::tensor(name, e.to_string()))
}

fn state_json(checkpoint: &Checkpoint, name: &str, backend: &Backend) -> Result<Map<String, Value>> {
    let bytes: Vec<u8> = backend.to_vec(&checkpoint.raw(name)?)?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(values)) => Ok(values),
        Ok(other) => Err(Error::tensor(name, format!("expected a JSON object, found {other}"))),
        Err(e) => Err(Error::tensor(name, format!("expected JSON text: {e}"))),
    }
}

struct State {
    name: String,
    values: Map<String, Value>,
}

impl State {
    fn bad(&self, key: &str, expected: &str) -> Error {
        let found = self.values.get(key).map_or("nothing".to_string(), Value::to_string);
        Error::tensor(&self.name, format!("`{key}`: expected {expected}, found {found}"))
    }

    fn expect(&self, key: &str, value: &Value) -> Result<()> {
        if self.values.get(key) == Some(value) { Ok(()) } else { Err(self.bad(key, &value.to_string())) }
    }

    fn number(&self, key: &str) -> Result<usize> {
        let number = self.values.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        number.ok_or_else(|| self.bad(key, "a whole number"))
    }

    fn shape(&self) -> Result<[usize; 2]> {
        let dims = self.values.get("shape").and_then(Value::as_array);
        let dim = |i: usize| dims?.get(i)?.as_u64().and_then(|n| usize::try_from(n).ok());
        match (dims.map(Vec::len), dim(0), dim(1)) {
            (Some(2), Some(rows), Some(cols)) => Ok([rows, cols]),
            _ => Err(self.bad("shape", "two whole numbers")),
        }
    }

    fn dtype(&self) -> Result<DType> {
        [DType::F32, DType::BF16, DType::F16]
            .into_iter()
            .find(|d| self.values.get("dtype") == Some(&json!(torch_name(*d))))
            .ok_or_else(|| self.bad("dtype", "float32, bfloat16 or float16"))
    }
}

/// The tensors that stand for the matrix `name`, in the state's dtype `dtype`.
///
/// # Errors
/// When bitsandbytes has no form for its format.
pub fn tensors(
    name: &str,
    matrix: &Quantized,
    dtype: DType,
    backend: &Backend,
) -> Result<Vec<(String, Tensor)>> {
    matrix.expect_rows()?;
    let format = matrix.config().format;
    let Some(levels) = format.levels().filter(|_| FORMATS.contains(&format.name)) else {
        return Err(Error::Unsupported(format!(
            "bitsandbytes has no four-bit form of {}; it has {}",
            format.name,
            FORMATS.join(" and ")
        )));
    };
    let [rows, cols] = *matrix.shape();
    let mut all = vec![(name.to_string(), matrix.codes().reshape(&[matrix.codes().elements(), 1])?)];
    let mut add = |suffix: &str, tensor: &Tensor| all.push((format!("{name}.{suffix}"), tensor.clone()));
    let mut state = json!({
        "quant_type": format.name, "blocksize": matrix.config().blocksize, "dtype": torch_name(dtype),
        "shape": [rows, cols],
    });
    match matrix.scales() {
        Scales::Plain(absmax) => add("absmax", absmax),
        Scales::Nested { codes, absmax, map, offset } => {
            add("absmax", codes);
            add("nested_absmax", absmax);
            add("nested_quant_map", map);
            state["nested_blocksize"] = json!(NESTED_BLOCKSIZE);
            state["nested_dtype"] = json!("float32");
            state["nested_offset"] = json!(f64::from(*offset));
        }
        Scales::Products { .. } => {
            return Err(Error::tensor(name, "bitsandbytes has no form of constants in GGUF's products"));
        }
    }
    add("quant_map", &backend.from_slice(levels, &[16])?);
    let text = python_json(&state);
    add(&format!("{STATE}{}", format.name), &backend.from_slice(text.as_bytes(), &[text.len()])?);
    Ok(all)
}

/// JSON as Python's `json.dumps` spaces it.
fn python_json(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let items: Vec<_> =
                map.iter().map(|(k, v)| format!("{}: {}", json!(k), python_json(v))).collect();
            format!("{{{}}}", items.join(", "))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(python_json).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}

/// The `quantization_config` of a `config.json` for weights in this form.
pub fn quantization_config(config: &QuantConfig, compute: DType) -> Value {
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": torch_name(compute),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": config.format.name,
        "bnb_4bit_use_double_quant": config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": null,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}
