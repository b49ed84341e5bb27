//! What a person sees of a run: a bar on a terminal, plain lines elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lowrank::train::Event;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Shows a run's events on stderr.
pub struct Progress {
    name: String, // with a colon; empty for a run by itself
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Progress {
    pub fn new(total_steps: usize, done: usize) -> Self {
        Self::of_job("", total_steps, done, &MultiProgress::new())
    }

    /// One of several bars.
    pub fn of_job(name: &str, total_steps: usize, done: usize, all: &MultiProgress) -> Self {
        let name = if name.is_empty() { String::new() } else { format!("{name}: ") };
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = all.add(ProgressBar::new(total_steps as u64));
            let template = "{prefix}{bar:30} {pos}/{len} {msg} {elapsed} left {eta}";
            bar.set_prefix(name.clone());
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_position(done as u64);
            bar.reset_eta();
            bar
        });
        Progress { name, bar, last_line: None }
    }

    /// Prints a line, above the bar if there is one.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("{}{text}", self.name)),
            None => eprintln!("{}{text}", self.name),
        }
    }

    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Step { metrics: m, total_steps } => {
                let numbers = format!("loss {:.4} {:.0} tokens/s", m.loss, m.tokens_per_second);
                match &self.bar {
                    Some(bar) => {
                        bar.set_position(m.step as u64);
                        bar.set_message(numbers);
                    }
                    // Without a terminal: the first and the last step, and a line every few seconds.
                    None => {
                        let due = self.last_line.is_none_or(|t| t.elapsed() > Duration::from_secs(5));
                        if due || m.step == *total_steps {
                            eprintln!("{}step {}/{total_steps}: {numbers}", self.name, m.step);
                            self.last_line = Some(Instant::now());
                        }
                    }
                }
            }
            Event::Evaluation(m) => {
                self.line(&format!(
                    "step {}: evaluation loss {:.4}, perplexity {:.3}",
                    m.step,
                    m.eval_loss,
                    m.eval_loss.exp()
                ));
            }
            Event::Checkpoint(path) => self.line(&format!("checkpoint: {}", path.display())),
            Event::EarlyStop(n) => {
                self.line(&format!("the evaluation loss has not improved {n} times: stopping early"))
            }
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}
