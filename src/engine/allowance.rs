//! What the choices of one request may decode together: the tokens that are paid for so far.
//!
//! Promises that no token is decoded beyond them, whichever choice decodes it and however many do in one step, and
//! that more are asked for in time, once for each time that some come. Pure; of the engine's thread alone.

use std::{cell::RefCell, rc::Rc};

use crate::domain::FundsEnd;

/// A choice's part in the allowance of its request. What it does not use is no longer wanted when it is dropped.
pub struct Share {
    account: Rc<RefCell<Account>>,
    /// Tokens that the choice could still use.
    usable: u32,
}

struct Account {
    left: u32,
    /// Tokens that the open choices could still use.
    usable: u64,
    /// More is asked for in such portions; 0 never.
    portion: u32,
    is_asked: bool,
    /// No more will come, and why.
    end: Option<Option<FundsEnd>>,
    /// What of `left` may be taken in the step of this number.
    promised: (u64, u32),
}

impl Share {
    /// One for each of `choices`, in which the most tokens that it could use are told.
    pub fn split(tokens: u32, portion: u32, choices: impl IntoIterator<Item = u32>) -> Vec<Self> {
        let end = (portion == 0).then_some(None);
        let account = Account { left: tokens, usable: 0, portion, is_asked: false, end, promised: (0, 0) };
        let account = Rc::new(RefCell::new(account));
        let share = |usable: u32| {
            account.borrow_mut().usable += u64::from(usable);
            Self { account: Rc::clone(&account), usable }
        };
        choices.into_iter().map(share).collect()
    }

    /// More is paid for. `last`: and that was all.
    pub fn allow(&self, tokens: u32, last: Option<FundsEnd>) {
        let mut account = self.account.borrow_mut();
        account.left = account.left.saturating_add(tokens);
        account.is_asked = false;
        if last.is_some() {
            account.end = Some(last);
        }
    }

    /// Sets up to `most` more tokens aside for this choice in step `step`, of which there are never two at a time.
    /// What is not taken in it is everybody's again in the next.
    pub fn promise(&self, most: usize, step: u64) -> usize {
        let mut account = self.account.borrow_mut();
        let promised = if account.promised.0 == step { account.promised.1 } else { 0 };
        let tokens = most.min((account.left - promised) as usize);
        account.promised = (step, promised + tokens as u32);
        tokens
    }

    /// The choice has decoded a token that was promised to it.
    pub fn take(&mut self) {
        let mut account = self.account.borrow_mut();
        assert!(account.promised.1 > 0 && self.usable > 0, "a token was decoded that is not paid for");
        account.left -= 1;
        account.usable -= 1;
        account.promised.1 -= 1;
        self.usable -= 1;
    }

    /// The choice has ended.
    pub fn close(&mut self) {
        self.account.borrow_mut().usable -= u64::from(std::mem::take(&mut self.usable));
    }

    /// Whether there is nothing left now.
    pub fn is_empty(&self) -> bool {
        self.account.borrow().left == 0
    }

    /// Whether there is nothing left and nothing will come, and why.
    pub fn end(&self) -> Option<Option<FundsEnd>> {
        let account = self.account.borrow();
        account.end.filter(|_| account.left == 0)
    }

    /// How many tokens should be paid for now, when the rest is running low. Asked once until some come.
    pub fn ask(&self) -> Option<u32> {
        let mut account = self.account.borrow_mut();
        let is_low = u64::from(account.left) * 2 <= u64::from(account.portion);
        let wanted = account.usable.saturating_sub(account.left.into()).min(account.portion.into()) as u32;
        if account.is_asked || account.end.is_some() || !is_low || wanted == 0 {
            return None;
        }
        account.is_asked = true;
        Some(wanted)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_promised_in_one_step_is_never_more_than_there_is() {
        let shares = Share::split(5, 0, [10, 10, 10]);
        assert_eq!([0, 1, 2].map(|i| shares[i].promise(2, 1)), [2, 2, 1]);
        assert_eq!(shares[0].promise(1, 1), 0);
        // Nobody took any of it.
        assert_eq!(shares[2].promise(9, 2), 5);
    }

    #[test]
    fn more_is_asked_for_at_half_a_portion_once_and_not_beyond_what_could_be_used() {
        let mut shares = Share::split(8, 8, [6, 6]);
        let spend = |share: &mut Share, tokens: usize| {
            assert_eq!(share.promise(tokens, tokens as u64), tokens);
            (0..tokens).for_each(|_| share.take());
        };
        spend(&mut shares[0], 3);
        assert_eq!(shares[0].ask(), None);
        spend(&mut shares[1], 1);
        assert_eq!((shares[0].ask(), shares[1].ask()), (Some(4), None));
        shares[0].allow(1, None);
        assert_eq!(shares[0].ask(), None);
        spend(&mut shares[1], 1);
        assert_eq!(shares[1].ask(), Some(3));
        // Without the first choice, what is left is enough.
        shares[0].allow(0, None);
        shares.remove(0);
        assert_eq!(shares[0].ask(), None);
    }

    #[test]
    fn who_is_told_that_no_more_comes_ends_when_nothing_is_left_and_asks_no_more() {
        let mut shares = Share::split(1, 4, [9]);
        assert_eq!((shares[0].end(), shares[0].ask()), (None, Some(4)));
        shares[0].allow(0, Some(FundsEnd::SpendLimit));
        assert_eq!((shares[0].end(), shares[0].ask()), (None, None));
        shares[0].promise(1, 1);
        shares[0].take();
        assert_eq!(shares[0].end(), Some(Some(FundsEnd::SpendLimit)));
        assert_eq!(Share::split(0, 0, [9])[0].end(), Some(None));
    }
}
