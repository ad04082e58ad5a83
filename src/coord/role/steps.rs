//! What follows from each event.

use uuid::Uuid;

use super::{Active, Answer, Claim, Part, Refused, RoleState, Step};
use crate::base::ids::{Generation, Lineage};

impl RoleState {
    pub(super) fn step_down(&self, head: Lineage) -> Result<Step, Refused> {
        match self.part {
            Part::Primary => Ok(self.becomes(Part::SteppedDown { head })),
            Part::SteppedDown { head: known } if known == head => Ok(self.stays(None)),
            _ => Err(self.refuse("only a primary can hand over")),
        }
    }

    pub(super) fn reclaim(&self, fresh: Uuid) -> Result<Step, Refused> {
        match self.part {
            // Asked again: the same claim, or the peer could consent to one that nobody uses.
            Part::SteppedDown { .. } if self.claim.is_some() => Ok(self.stays(None)),
            Part::SteppedDown { .. } => {
                let claim = Some(self.after(self.generation, fresh)?);
                Ok(step(Self { claim, ..*self }))
            }
            _ => Err(self.refuse("there is no planned failover to cancel")),
        }
    }

    pub(super) fn handed_over(
        &self,
        from: Generation,
        head: Lineage,
        ours: Option<Lineage>,
        fresh: Uuid,
    ) -> Result<Step, Refused> {
        match self.part {
            Part::Replica { abandoned: false } => {}
            // It may have been ahead of what is handed over now.
            Part::Replica { abandoned: true } => {
                return Err(self.refuse(
                    "a failover was cancelled here, so `understudy cancel` on the host that stepped down comes first",
                ));
            }
            _ => return Err(self.refuse("only a replica can take over")),
        }
        self.expect(from)?;
        if ours != Some(head) {
            return Err(Refused::Head);
        }
        let generation = self.after(self.generation, fresh)?;
        Ok(step(Self {
            generation,
            born: Some(head),
            part: Part::Primary,
            claim: None,
        }))
    }

    pub(super) fn promote(
        &self,
        expected: Generation,
        point: Lineage,
        fresh: Uuid,
    ) -> Result<Step, Refused> {
        match self.part {
            Part::Replica { .. } => {}
            _ => return Err(self.refuse("only a replica can be failed over to")),
        }
        self.expect(expected)?;
        let generation = self.after(self.generation, fresh)?;
        Ok(step(Self {
            generation,
            born: Some(point),
            part: Part::FailedOver {
                from: self.generation,
                point,
            },
            claim: None,
        }))
    }

    pub(super) fn commit(&self) -> Result<Step, Refused> {
        match self.part {
            Part::FailedOver { .. } => Ok(self.becomes(Part::Primary)),
            Part::Primary => Ok(self.stays(None)),
            _ => Err(self.refuse("there is no failover to commit")),
        }
    }

    pub(super) fn cancel(&self) -> Result<Step, Refused> {
        match self.part {
            Part::FailedOver { .. } => Ok(step(Self {
                born: None,
                ..self.becomes(Part::Replica { abandoned: true }).next
            })),
            Part::Replica { abandoned: true } => Ok(self.stays(None)),
            _ => Err(self.refuse("there is no uncommitted failover to cancel")),
        }
    }

    pub(super) fn reverse(&self) -> Result<Step, Refused> {
        match self.part {
            Part::Fenced { by } => Ok(step(Self {
                claim: None,
                ..self.becomes(Part::Returning { to: by }).next
            })),
            Part::Returning { .. } => Ok(self.stays(None)),
            _ => Err(self.refuse("only a host that was fenced is reversed")),
        }
    }

    pub(super) fn lose(&self) -> Result<Step, Refused> {
        match self.part {
            Part::Split { other, .. } => Ok(self.becomes(Part::Fenced { by: other })),
            _ => Err(self.refuse("there is no split brain to end")),
        }
    }

    pub(super) fn win(&self, fresh: Uuid) -> Result<Step, Refused> {
        let Part::Split { was, .. } = self.part else {
            return Err(self.refuse("there is no split brain to end"));
        };
        let part = match was {
            Active::Primary | Active::SteppedDown { .. } => Part::Primary,
            Active::FailedOver { from, point } => Part::FailedOver { from, point },
        };
        let generation = self.after(self.generation, fresh)?;
        Ok(step(Self {
            generation,
            ..self.becomes(part).next
        }))
    }

    pub(super) fn divergence_taken(&self, by: Generation) -> Result<Step, Refused> {
        match self.part {
            Part::Returning { to } if to == by => Ok(step(Self::replica(to))),
            Part::Replica { abandoned: false } if self.generation == by => Ok(self.stays(None)),
            _ => Err(self.refuse("nobody is returning to this generation")),
        }
    }

    /// A peer calls. It is answered in any case.
    pub(super) fn claimed(&self, claim: &Claim) -> Step {
        if claim.generation.number > self.generation.number {
            return self.meet_higher(claim);
        }
        if claim.generation.number == self.generation.number && claim.generation != self.generation
        {
            return self.meet_equal(claim.generation);
        }
        if let Some(wanted) = claim.wants
            && let Some(step) = self.consent(claim, wanted)
        {
            return step;
        }
        if claim.generation == self.generation {
            return match self.part {
                Part::Replica { abandoned: false } => {
                    self.stays(Some(Answer::Follows(self.generation)))
                }
                // Nobody else can be in a generation that is or was active here.
                _ => self.stays(Some(Answer::Split {
                    theirs: self.generation,
                })),
            };
        }
        self.stays(Some(Answer::Higher {
            theirs: self.generation,
            abandoned: self.part == Part::Replica { abandoned: true },
        }))
    }

    /// A primary without a generation of its own asks this replica to move on to one.
    fn consent(&self, claim: &Claim, wanted: Generation) -> Option<Step> {
        let Part::Replica { abandoned } = self.part else {
            return None;
        };
        let again = self.generation == wanted;
        // The generation that is given up was the claimant's own, or nobody's.
        let free = abandoned || self.generation == claim.generation;
        if again || free && wanted.number > self.generation.number {
            let next = Self::replica(wanted);
            return Some(Step {
                next,
                answer: Some(Answer::Follows(wanted)),
            });
        }
        None
    }

    fn meet_higher(&self, claim: &Claim) -> Step {
        let theirs = claim.generation;
        let fenced = || Step {
            answer: Some(Answer::NotReversed),
            next: self.fenced(theirs),
        };
        let follows = || Step {
            next: Self::replica(theirs),
            answer: Some(Answer::Follows(theirs)),
        };
        match self.part {
            Part::Replica { .. } if claim.active => follows(),
            Part::Replica { .. } => self.stays(Some(Answer::Lower(self.generation))),
            // The failover that was prepared here has happened, and nothing was written in between.
            Part::SteppedDown { head } if claim.active && claim.born == Some(head) => follows(),
            Part::Returning { .. } if claim.active => Step {
                answer: Some(Answer::Diverged(theirs)),
                ..self.becomes(Part::Returning { to: theirs })
            },
            Part::Returning { .. } => self.stays(Some(Answer::NotReversed)),
            Part::Primary
            | Part::SteppedDown { .. }
            | Part::FailedOver { .. }
            | Part::Fenced { .. }
            | Part::Split { .. } => fenced(),
        }
    }

    /// This node after it met a higher generation.
    fn fenced(&self, theirs: Generation) -> Self {
        let by = match self.part {
            Part::Fenced { by } if by.number > theirs.number => by,
            _ => theirs,
        };
        Self {
            claim: None,
            part: Part::Fenced { by },
            ..*self
        }
    }

    fn meet_equal(&self, other: Generation) -> Step {
        let answer = Some(Answer::Split {
            theirs: self.generation,
        });
        Step {
            answer,
            next: self.split(other).unwrap_or(*self),
        }
    }

    fn split(&self, other: Generation) -> Option<Self> {
        let was = match self.part {
            Part::Primary => Active::Primary,
            Part::SteppedDown { head } => Active::SteppedDown { head },
            Part::FailedOver { from, point } => Active::FailedOver { from, point },
            _ => return None,
        };
        Some(Self {
            claim: None,
            ..self.becomes(Part::Split { other, was }).next
        })
    }

    /// The peer answered a claim.
    pub(super) fn answered(&self, answer: Answer, fresh: Uuid) -> Result<Step, Refused> {
        match answer {
            // Higher only by what was chosen here: the peer consented, and that answer was lost.
            Answer::Follows(generation)
            | Answer::Higher {
                theirs: generation,
                abandoned: false,
            } if self.claim == Some(generation) => Ok(step(Self {
                generation,
                born: None,
                part: Part::Primary,
                claim: None,
            })),
            Answer::Higher { theirs, abandoned } if theirs.number > self.generation.number => {
                self.learns_of(theirs, abandoned, fresh)
            }
            Answer::Split { theirs }
                if theirs.number == self.generation.number && theirs != self.generation =>
            {
                Ok(step(self.split(theirs).unwrap_or(*self)))
            }
            _ => Ok(self.stays(None)),
        }
    }

    fn learns_of(&self, theirs: Generation, abandoned: bool, fresh: Uuid) -> Result<Step, Refused> {
        let active = matches!(self.part, Part::Primary | Part::SteppedDown { .. });
        let by_it = matches!(self.part, Part::Fenced { by } if by.number <= theirs.number);
        if abandoned && (active || by_it) {
            let claimed = self.claim.filter(|claim| claim.number > theirs.number);
            let claim = match claimed {
                Some(claim) => claim,
                None => self.after(theirs, fresh)?,
            };
            return Ok(step(Self {
                claim: Some(claim),
                ..*self
            }));
        }
        match self.part {
            Part::Primary | Part::FailedOver { .. } | Part::Split { .. } => {
                Ok(step(self.fenced(theirs)))
            }
            // The peer was promoted: it will call, and tell from where.
            Part::SteppedDown { .. } => Ok(step(Self {
                claim: None,
                ..*self
            })),
            Part::Fenced { by } if by.number < theirs.number => Ok(step(self.fenced(theirs))),
            Part::Fenced { .. } | Part::Returning { .. } | Part::Replica { .. } => {
                Ok(self.stays(None))
            }
        }
    }

    fn becomes(&self, part: Part) -> Step {
        step(Self { part, ..*self })
    }

    fn stays(&self, answer: Option<Answer>) -> Step {
        Step {
            next: *self,
            answer,
        }
    }

    fn refuse(&self, wanted: &'static str) -> Refused {
        Refused::Part {
            part: self.describe(),
            wanted,
        }
    }

    fn expect(&self, expected: Generation) -> Result<(), Refused> {
        if expected == self.generation {
            return Ok(());
        }
        Err(Refused::Generation {
            expected,
            found: self.generation,
        })
    }

    /// The generation after `last`, with the identity `id`.
    fn after(&self, last: Generation, id: Uuid) -> Result<Generation, Refused> {
        let number = last.number.max(self.generation.number).checked_add(1);
        let number = number.ok_or(Refused::Exhausted(last))?;
        Ok(Generation { number, id })
    }
}

fn step(next: RoleState) -> Step {
    Step { next, answer: None }
}
