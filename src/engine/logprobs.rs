//! How likely the model held a token, beside the others.

use super::sampler::{largest, soften, sum};
use crate::domain::TokenDetail;

/// What is told of `token` in this row of logits, and of the `top` likeliest. `weights` is scratch.
pub fn detail(row: &[f32], token: u32, top: usize, weights: &mut Vec<f32>) -> TokenDetail {
    let largest = largest(row);
    weights.resize(row.len(), 0.0);
    soften(row, largest, 1.0, weights);
    let log_total = f64::from(largest) + sum(weights).ln();
    let logprob = |logit: f32| (f64::from(logit) - log_total) as f32;
    let own = row.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    TokenDetail {
        token,
        logprob: logprob(own),
        rank: 1 + row.iter().filter(|logit| **logit > own).count() as u32,
        top: likeliest(row, top).into_iter().map(|(logit, token)| (token, logprob(logit))).collect(),
        is_hidden: false,
    }
}

/// Of equals, the lower ids first.
fn likeliest(row: &[f32], count: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(count + 1);
    let mut least = f32::NEG_INFINITY;
    for (logit, token) in row.iter().copied().zip(0u32..) {
        if best.len() == count && logit <= least || count == 0 {
            continue;
        }
        let at = best.partition_point(|(other, _)| *other >= logit);
        best.insert(at, (logit, token));
        best.truncate(count);
        least = best.last().map_or(f32::NEG_INFINITY, |(logit, _)| *logit);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logprobs_are_those_of_the_softmax_and_the_likeliest_come_in_order() {
        let row: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 613) as f32 / 100.0).collect();
        let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let expected = |token: u32| (f64::from(row[token as usize]).exp() / total).ln();
        let told = detail(&row, 17, 20, &mut Vec::new());
        assert!((f64::from(told.logprob) - expected(17)).abs() < 1e-5);
        assert_eq!(told.top.len(), 20);
        let mut order: Vec<u32> = (0..1000).collect();
        order.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)));
        assert_eq!(told.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), order[..20]);
        for (token, logprob) in &told.top {
            assert!((f64::from(*logprob) - expected(*token)).abs() < 1e-5);
        }
        let better = row.iter().filter(|x| **x > row[17]).count() as u32;
        assert_eq!(told.rank, better + 1);
        assert!(detail(&row, 17, 0, &mut Vec::new()).top.is_empty());
    }
}
