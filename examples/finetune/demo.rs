pub fn run() -> lowrank::Result<()> {
    Ok(())
}
