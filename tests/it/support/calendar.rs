//! Days and months as one counts them on one's fingers.

const DAY_MS: u64 = 86_400_000;

/// Since 1970.
pub fn day_at(unix_ms: u64) -> i64 {
    (unix_ms / DAY_MS) as i64
}

/// `20261123`.
pub fn day_name(day: i64) -> String {
    let (year, month, of_month) = date(day);
    format!("{year:04}{month:02}{of_month:02}")
}

/// The day of a name.
pub fn day_named(name: &str) -> i64 {
    let first = (name[..4].parse::<i64>().expect("a year") - 1970) * 365;
    (first..).find(|day| day_name(*day) == name).expect("a day")
}

/// `202611`.
pub fn month_of(day: i64) -> String {
    let (year, month, _) = date(day);
    format!("{year:04}{month:02}")
}

fn date(day: i64) -> (i64, usize, i64) {
    let is_leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let (mut year, mut left) = (1970, day);
    while left >= 365 + i64::from(is_leap(year)) {
        left -= 365 + i64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + i64::from(is_leap(year));
    let mut month = 1;
    for days in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if left < days {
            break;
        }
        left -= days;
        month += 1;
    }
    (year, month, left + 1)
}

#[test]
fn leap_years_and_ends_of_months() {
    for (day, name) in
        [(0, "19700101"), (59, "19700301"), (11_016, "20000229"), (20_088, "20241231"), (20_780, "20261123")]
    {
        assert_eq!((day_name(day).as_str(), day_named(name)), (name, day));
    }
}
