"""What the site does about what the gates measured: pass, warn, hold for review or refuse.

Pure functions of readings and settings. The engine says how a value stands to the levels of its
bundle; for each destination the policy says what follows from that, and the worst of it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dicom_node.breaker import Rule
from dicom_node.ledger.states import Verdict
from dicom_node.ledger.verdicts import NOWHERE
from dicom_node.readings import GateReading, Level
from dicom_node.settings import NodeSettings

__all__ = ["Judgement", "breaker_rule", "gate_verdict", "judge", "silent_rules", "worst"]

_ORDER = tuple(Verdict)
UNCALIBRATED = "the limits of the gates were not learnt for this model"
UNJUDGED = "no gate could judge the result"


@dataclass(frozen=True)
class Judgement:
    """What becomes of one result, for each destination, and why."""

    verdicts: Mapping[str, Verdict]  #: by destination; NOWHERE where there is none
    reasons: tuple[str, ...]  #: every gate that has a say, the gravest first
    failed: bool  #: a gate is past its limit, whatever the policy makes of that

    @property
    def worst(self) -> Verdict:
        """The gravest of the verdicts."""
        return worst(self.verdicts.values())

    @property
    def sendable(self) -> bool:
        """Whether a destination may have the result, now or once a person released it."""
        return any(verdict is not Verdict.REFUSE for verdict in self.verdicts.values())

    @property
    def suffix_due(self) -> bool:
        """Whether the description has to say that not everything was as it should be."""
        return self.worst is not Verdict.PASS

    @property
    def reason(self) -> str | None:
        """The reasons in one line; None where there is nothing to say."""
        return "; ".join(self.reasons) or None


def judge(
    readings: Sequence[GateReading],
    *,
    calibrated: bool,
    modality: str,
    destinations: Sequence[str],
    settings: NodeSettings,
) -> Judgement:
    """The verdict for each destination of a job on what the gates measured.

    A result that no gate could judge is held: the absence of a failure is no evidence.
    """
    verdicts = {
        destination: worst(
            [
                *(_verdict(each, modality, destination, settings) for each in readings),
                *([] if calibrated else [Verdict(settings.gates.uncalibrated)]),
                *([] if _is_judged(readings) else [Verdict.HOLD]),
            ]
        )
        for destination in dict.fromkeys(destinations or [NOWHERE])
    }
    return Judgement(
        verdicts,
        _reasons(readings, calibrated, verdicts, modality, settings),
        failed=any(each.level is Level.FAIL for each in readings),
    )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The gravest of some verdicts; PASS of none."""
    return max(verdicts, key=_ORDER.index, default=Verdict.PASS)


def action(gate: str, modality: str, destination: str, settings: NodeSettings) -> Verdict:
    """What a gate past its limit leads to: the destination's word, the modality's, the gate's."""
    gates = settings.gates
    by_modality = {str(name): actions for name, actions in gates.by_modality.items()}
    tables = (
        gates.by_destination.get(destination, {}),
        by_modality.get(modality, {}),
        gates.actions,
        # What lies outside the domain has a policy already, which the header alone can trip.
        {"domain": settings.policy.domain},
    )
    return Verdict(next((table[gate] for table in tables if gate in table), gates.on_fail))


def gate_verdict(
    reading: GateReading, modality: str, judgement: Judgement, settings: NodeSettings
) -> Verdict:
    """What one reading leads to where it leads to the gravest."""
    return worst(_verdict(reading, modality, name, settings) for name in judgement.verdicts)


def silent_rules(settings: NodeSettings) -> tuple[str, ...]:
    """The settings by which a result that failed a gate is sent without a word of it."""
    gates = settings.gates
    tables = {
        "actions": gates.actions,
        **{f"by_modality.{name}": actions for name, actions in gates.by_modality.items()},
        **{f"by_destination.{name}": actions for name, actions in gates.by_destination.items()},
    }
    return (
        *(["on_fail"] if gates.on_fail == "pass" else []),
        *(
            f"{table}.{gate}"
            for table, actions in tables.items()
            for gate, does in actions.items()
            if does == "pass"
        ),
    )


def breaker_rule(settings: NodeSettings) -> Rule:
    """The rule of the circuit breakers."""
    given = settings.breaker
    return Rule(given.window, given.lowest, given.highest, given.significance)


def _verdict(
    reading: GateReading, modality: str, destination: str, settings: NodeSettings
) -> Verdict:
    if reading.level is Level.FAIL:
        return action(reading.gate, modality, destination, settings)
    if reading.level is Level.WARN:
        return Verdict(settings.gates.on_warn)
    return Verdict.PASS


def _is_judged(readings: Sequence[GateReading]) -> bool:
    return any(each.level is not Level.NOT_APPLICABLE for each in readings)


def _reasons(
    readings: Sequence[GateReading],
    calibrated: bool,
    verdicts: Mapping[str, Verdict],
    modality: str,
    settings: NodeSettings,
) -> tuple[str, ...]:
    """Every gate with a say for some destination, the gravest first."""
    ranked = [
        (worst(_verdict(each, modality, name, settings) for name in verdicts), each)
        for each in readings
    ]
    told = sorted(
        (pair for pair in ranked if pair[0] is not Verdict.PASS),
        key=lambda pair: -_ORDER.index(pair[0]),
    )
    words = [f"gate {_words(reading)}" for _, reading in told]
    if not _is_judged(readings):
        words.append(UNJUDGED)
    if not calibrated and settings.gates.uncalibrated != "pass":
        words.append(UNCALIBRATED)
    return tuple(dict.fromkeys(words))


def _words(reading: GateReading) -> str:
    """One gate in words: what it found, where, and what it would have allowed."""
    value, unit = reading.worst_value, "" if reading.unit == "1" else f" {reading.unit}"
    place = "" if reading.worst_slice is None else f" in slice {reading.worst_slice + 1}"
    bounds = reading.fail if reading.level is Level.FAIL else reading.warn
    found = "" if value is None else f" is {value:.4g}{unit}{place}"
    allowed = "" if bounds == (None, None) else f" (allowed {interval(bounds)})"
    because = f": {reading.reason}" if reading.reason else ""
    return f"{reading.gate} {_STANDS[reading.level]}{found}{allowed}{because}"


_STANDS = {Level.FAIL: "failed:", Level.WARN: "warns:"}


def interval(bounds: tuple[float | None, float | None]) -> str:
    """The values inside *bounds* in words; one side at least is bounded."""
    low, high = bounds
    if low is None:
        return f"at most {high:.4g}"
    if high is None:
        return f"at least {low:.4g}"
    return f"{low:.4g} ... {high:.4g}"
