"""When the rate of failed gates says that something other than the images has changed.

One series that fails a gate is a matter for a reviewer. Many of them are a matter for whoever runs
the node: another protocol, a damaged model, a gate that no longer fits. Pure functions of counts;
`ledger.verdicts` keeps the counts and the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Rule", "at_least", "at_most", "leaves_band"]


@dataclass(frozen=True)
class Rule:
    """The band of the fail rate, and how sure one must be that it was left."""

    window: int  #: jobs of one modality and one model, the latest
    lowest: float  #: fail rate, 0 … 1; 0: too few failures are no alarm
    highest: float  #: fail rate, 0 … 1
    significance: float  #: of each of the two one-sided tests


def leaves_band(failed: int, judged: int, rule: Rule) -> str | None:
    """Why *failed* of the last *judged* jobs do not fit the band, or None.

    The exact binomial test (Clopper and Pearson 1934), one-sided for each edge of the band: were
    the rate at that edge, so many or so few failures would come with a probability below the
    significance. Raises ValueError where the counts cannot be.
    """
    if not 0 <= failed <= judged:
        raise ValueError(f"{failed} of {judged} jobs cannot have failed")
    above = at_least(failed, judged, rule.highest)
    if above < rule.significance:
        return _words(failed, judged, f"at most {rule.highest:.1%} expected", above)
    below = at_most(failed, judged, rule.lowest)
    if below < rule.significance:
        return _words(failed, judged, f"at least {rule.lowest:.1%} expected", below)
    return None


def at_least(successes: int, trials: int, rate: float) -> float:
    """P(X ≥ successes) for X binomial with so many trials."""
    return _sum(range(successes, trials + 1), trials, rate)


def at_most(successes: int, trials: int, rate: float) -> float:
    """P(X ≤ successes) for X binomial with so many trials."""
    return _sum(range(successes + 1), trials, rate)


def _sum(successes: range, trials: int, rate: float) -> float:
    terms = (math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in successes)
    return min(1.0, math.fsum(terms))


def _words(failed: int, judged: int, expected: str, probability: float) -> str:
    return (
        f"{failed} of the last {judged} jobs failed a gate, {expected} (exact binomial p = "
        f"{probability:.1g})"
    )
