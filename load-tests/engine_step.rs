//! Time of one engine step, without scheduling, sampling or the network: where tuning of the graph starts.
//!
//! `cargo run --release --example engine-step [-- DATA_DIR]`

use std::{error::Error, path::PathBuf, time::Instant};

use lightcone::{
    engine::{
        Batch, BatchSequence, Forward,
        onnx::{OnnxModel, OnnxRuntime, Part, RuntimeOptions},
    },
    model::ModelFile,
};

const CONTEXT: usize = 256;
const BLOCK: usize = 16;
const LONG: usize = 2000;

fn main() -> Result<(), Box<dyn Error>> {
    let data_dir = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| ".lightcone".into()));
    let threads = std::thread::available_parallelism()?.get();
    let library = OnnxRuntime::find_library("".as_ref(), &data_dir);
    let runtime =
        OnnxRuntime::start(RuntimeOptions { library, threads, spinning: true, providers: vec!["cpu".into()] })?;
    let started = Instant::now();
    let file = ModelFile::open(&data_dir.join("models/SmolLM2-135M-Instruct.Q4_1.gguf"))?;
    let mut model = OnnxModel::load(&runtime, &file, 64 * CONTEXT / BLOCK, BLOCK, 2048)?;
    println!("{threads} threads; loaded in {:.2} s; {}", started.elapsed().as_secs_f64(), memory()?);

    let tokens: Vec<u32> = (0..2048).map(|i| 100 + i * 37 % 40_000).collect();
    // Keys and values that nobody wrote would all be read from one page of zeros.
    for from in (0..CONTEXT).step_by(64) {
        step(&mut model, &tokens, 32, from, 64)?;
    }
    for sequences in [1usize, 2, 4, 5, 6, 7, 8, 12, 16, 32] {
        let ms = median(24, || step(&mut model, &tokens, sequences, CONTEXT - 1, 1))?;
        let rate = sequences as f64 / ms * 1e3;
        println!("decode  {sequences:3} sequences at {CONTEXT} tokens: {ms:7.2} ms a step, {rate:6.0} tokens/s");
        println!("    {}", parts(&model));
    }
    for rows in [16usize, 32, 64, 128, 256] {
        let ms = median(8, || step(&mut model, &tokens, 1, 0, rows))?;
        let rate = rows as f64 / ms * 1e3;
        println!("prefill {rows:3} rows of one sequence:       {ms:7.2} ms a step, {rate:6.0} tokens/s");
        println!("    {}", parts(&model));
    }
    for streams in [1usize, 4] {
        for rows in [0usize, 1, 2, 4, 5, 8, 16] {
            let ms = median(24, || mixed(&mut model, &tokens, streams, rows))?;
            println!("{streams} streams and {rows:2} rows of a prompt of {LONG} tokens: {ms:7.2} ms a step");
            println!("    {}", parts(&model));
        }
    }
    println!("{}", memory()?);
    Ok(())
}

/// Streams decode, and `rows` at the end of a long prompt catch up.
fn mixed(model: &mut OnnxModel, tokens: &[u32], streams: usize, rows: usize) -> Result<(), Box<dyn Error>> {
    let of = |blocks: std::ops::Range<usize>| blocks.map(|block| block as u32).collect::<Vec<u32>>();
    let long = of(0..LONG / BLOCK);
    let others: Vec<_> = (0..streams).map(|s| of(LONG / BLOCK + s * 16..LONG / BLOCK + s * 16 + 16)).collect();
    let decode = |blocks| BatchSequence {
        tokens: &tokens[..CONTEXT],
        prompt_tokens: CONTEXT - 1,
        computed: CONTEXT - 1,
        rows: 1,
        logits_rows: 1,
        blocks,
    };
    let mut sequences: Vec<_> = others.iter().map(|blocks| decode(blocks)).collect();
    if rows > 0 {
        let computed = LONG - rows - 1;
        let tokens = &tokens[..LONG];
        sequences.push(BatchSequence { tokens, prompt_tokens: LONG, computed, rows, logits_rows: 0, blocks: &long });
    }
    model.forward(&Batch { sequences })?;
    Ok(())
}

fn step(
    model: &mut OnnxModel,
    tokens: &[u32],
    sequences: usize,
    computed: usize,
    rows: usize,
) -> Result<(), Box<dyn Error>> {
    let blocks: Vec<Vec<u32>> =
        (0..sequences).map(|s| (0..CONTEXT / BLOCK).map(|b| (s * CONTEXT / BLOCK + b) as u32).collect()).collect();
    let sequence = |s: usize| BatchSequence {
        tokens: &tokens[..computed + rows],
        prompt_tokens: computed,
        computed,
        rows,
        logits_rows: 1,
        blocks: &blocks[s],
    };
    model.forward(&Batch { sequences: (0..sequences).map(sequence).collect() })?;
    Ok(())
}

/// What the process has in memory beside mapped files.
fn memory() -> Result<String, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Which share of the steps went to which part of their work.
fn parts(model: &OnnxModel) -> String {
    let times = Part::ALL.map(|part| (part, model.take_time(part).as_secs_f64()));
    let total: f64 = times.iter().map(|(_, seconds)| seconds).sum();
    times.map(|(part, seconds)| format!("{part:?} {:.0}%", seconds / total * 100.0)).join(", ")
}

/// Milliseconds.
fn median(rounds: usize, mut run: impl FnMut() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    run()?;
    let mut times = Vec::new();
    for _ in 0..rounds {
        let started = Instant::now();
        run()?;
        times.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[rounds / 2])
}
