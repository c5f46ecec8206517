"""Gates without a reference: what a restored series says about itself beside its input.

A generative prior can invent or remove structure, and in the clinic there is no true image to
compare with. These gates compare input and output and say how unusual their relation is; the
levels are learnt from subjects the model was not trained on (`diffcode calibrate`).
"""

from restoration.fidelity.assess import LEAST_SIDE, Again, Evidence, assess, judge, measure
from restoration.fidelity.calibration import Calibration, InputModel, ScanModel
from restoration.fidelity.catalogue import GATES, GateSpec
from restoration.fidelity.gathered import MEASURES, SliceMeasures, measure_slices
from restoration.fidelity.measured import Measured
from restoration.fidelity.verdicts import Bounds, Fidelity, Gate, Levels, Verdict, worst

__all__ = [
    "GATES",
    "LEAST_SIDE",
    "MEASURES",
    "Bounds",
    "Calibration",
    "Again",
    "Evidence",
    "Fidelity",
    "Gate",
    "GateSpec",
    "InputModel",
    "Levels",
    "Measured",
    "ScanModel",
    "SliceMeasures",
    "Verdict",
    "assess",
    "judge",
    "measure",
    "measure_slices",
    "worst",
]
