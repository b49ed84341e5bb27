//! Merges an adapter into its base, tensor by tensor: `03_merge MODEL_DIR ADAPTER_DIR OUTPUT_DIR`

use lowrank::Result;
use lowrank::adapter::merge::{MergeOptions, merge};
use std::path::Path;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let [_, model, adapter, output] = args.as_slice() else {
        eprintln!("usage: 03_merge MODEL_DIR ADAPTER_DIR OUTPUT_DIR");
        std::process::exit(2);
    };
    let (model, adapter, output) = (Path::new(model), Path::new(adapter), Path::new(output));
    let merged = merge(model, adapter, output, &MergeOptions::default())?;
    println!("{} of {} tensors changed", merged.adapted, merged.tensors);
    Ok(())
}
