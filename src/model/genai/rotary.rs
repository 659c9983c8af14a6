//! The base of the rotary angles, which stands nowhere but in the tables of cosines and sines.
//!
//! Promises that the base makes the tables, as far as their precision tells: angles that were scaled in some
//! way are an error.

use super::{
    data::{Initializer, Type},
    graph::wrong,
};
use crate::model::ModelError;

/// Positions at which the tables are held against the base.
const CHECKED_MAX: usize = 512;

/// Of tables `[positions, head_size / 2]`.
pub fn base(cos: &Initializer, sin: &Initializer, head_size: usize, positions: usize) -> Result<f32, ModelError> {
    let pairs = head_size / 2;
    for table in [cos, sin] {
        if table.dims.len() != 2 || table.dims[0] < positions || table.dims[1] != pairs || !table.ty.is_float() {
            let wanted = format!("at least [{positions}, {pairs}] floats");
            return Err(wrong(format!("`{}` has the shape {:?}, expected {wanted}", table.name, table.dims)));
        }
    }
    if pairs < 2 || positions < 2 {
        return Err(wrong("tables of angles for one pair or one position say nothing of their base".into()));
    }
    let found = |position: usize, pair: usize| {
        let at = position * pairs + pair;
        (f64::from(cos.float(at)), f64::from(sin.float(at)))
    };
    let precision = match cos.ty {
        Type::F16 => 1e-3,
        Type::Bf16 => 8e-3,
        _ => 5e-7,
    };
    // The last pair turns slowest, and says most of the base: its angle at position 1 is base^(-(d - 2) / d). It is
    // read where it is large enough for half precision, and not yet half a turn.
    let last = pairs - 1;
    let mut at = 1;
    while at * 2 < positions && found(at, last).1 < 0.25 {
        at *= 2;
    }
    let (cosine, sine) = found(at, last);
    let estimate = (sine.atan2(cosine) / at as f64).powf(-(pairs as f64) / last as f64);
    if !estimate.is_finite() || estimate <= 1.0 {
        return Err(unknown());
    }
    let base = shortest(estimate, precision * 4.0);
    let step = positions.div_ceil(CHECKED_MAX);
    for position in (0..positions).step_by(step).chain([1, 2, 3, positions - 1]) {
        for pair in 0..pairs {
            let frequency = f64::from(base).powf(-(pair as f64) / pairs as f64);
            let angle = position as f64 * frequency;
            // The frequency was rounded to single precision, and so was its product with the position.
            let allowed = precision + angle * 4e-7;
            let (cosine, sine) = found(position, pair);
            let off = (cosine - angle.cos()).abs().max((sine - angle.sin()).abs());
            if off.is_nan() || off > allowed {
                return Err(unknown());
            }
        }
    }
    Ok(base)
}

/// The number with the fewest digits within `precision` of the estimate: bases are round.
fn shortest(estimate: f64, precision: f64) -> f32 {
    let digits = (0..9).map(|digits| format!("{estimate:.digits$e}").parse::<f64>().unwrap_or(estimate));
    let mut close = digits.filter(|round| (round / estimate - 1.0).abs() <= precision);
    close.next().unwrap_or(estimate) as f32
}

fn unknown() -> ModelError {
    wrong("its rotary angles are not the powers of one base; scaled rotary embeddings are not supported".into())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use half::{bf16, f16};

    use super::*;
    use crate::model::genai::data::Span;

    /// Tables as the builder makes them: in single precision throughout, then rounded.
    fn tables(base: f32, scale: f32, ty: Type, head_size: usize, positions: usize) -> [Initializer; 2] {
        let pairs = head_size / 2;
        let angle = |at: usize| {
            let frequency = 1.0 / (scale * base.powf((at % pairs * 2) as f32 / head_size as f32));
            (at / pairs) as f32 * frequency
        };
        [f32::cos, f32::sin].map(|turn| {
            let bytes = (0..positions * pairs).flat_map(|at| match (ty, turn(angle(at))) {
                (Type::F16, x) => f16::from_f32(x).to_le_bytes().to_vec(),
                (Type::Bf16, x) => bf16::from_f32(x).to_le_bytes().to_vec(),
                (_, x) => x.to_le_bytes().to_vec(),
            });
            let data = Span::Inline(Bytes::from(bytes.collect::<Vec<_>>()));
            Initializer { name: "table".into(), dims: vec![positions, pairs], ty, data }
        })
    }

    #[test]
    fn a_base_is_found_again_in_tables_of_any_precision() {
        for (wanted, head_size) in [(10_000.0, 64), (100_000.0, 64), (130_000.0, 128), (500_000.0, 128), (1e6, 32)] {
            for ty in [Type::F32, Type::F16, Type::Bf16] {
                let [cos, sin] = tables(wanted, 1.0, ty, head_size, 4096);
                assert_eq!(base(&cos, &sin, head_size, 4096).unwrap(), wanted, "{ty:?} {head_size}");
            }
        }
    }

    #[test]
    fn scaled_angles_and_tables_of_another_shape_are_refused() {
        let [cos, sin] = tables(10_000.0, 4.0, Type::F32, 64, 256);
        let error = base(&cos, &sin, 64, 256).unwrap_err().to_string();
        assert!(error.contains("scaled rotary embeddings are not supported"), "{error}");
        let [cos, sin] = tables(10_000.0, 1.0, Type::F32, 64, 256);
        assert!(base(&cos, &sin, 64, 256).is_ok());
        assert!(base(&cos, &sin, 64, 257).is_err());
        assert!(base(&cos, &sin, 32, 256).is_err());
        assert!(base(&sin, &cos, 64, 256).is_err());
        let [nothing, _] = tables(f32::NAN, 1.0, Type::F32, 64, 256);
        assert!(base(&nothing, &sin, 64, 256).is_err());
    }
}
