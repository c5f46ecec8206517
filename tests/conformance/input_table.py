"""The table of inputs and what becomes of them: `python -m tests.conformance.input_table`.

Every folder of real series, and series by code for what those lack, goes through the node with a
model that returns its input. `docs/input-table.md` is what this prints; a test keeps it so.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicom_node.dicom.header import quiet_pydicom, text
from dicom_node.inference import Engine, LocalEngine
from dicom_node.settings import NodeSettings
from restoration.bundle import write_bundle
from tests.conformance.journey import Outcome, go_through
from tests.factories import NAMES, make_series, uid, write_series
from tests.multiframe import legacy_converted, make_enhanced
from tests.unit.restoration.conftest import FIELDS, quiet, small_model

HEAD = """# What becomes of what comes in

Made by `make input-table`; a test keeps it so. Each series went the whole way of the node, but for
the network and the ledger, with the default policy and a model without a training domain that
returns its input: what is derived has the pixels of its source, and the gates, which judge a
network, let everything pass. With another model its domain and the gates may refuse more; see
`dicom-node jobs list` for the reason.

"""

# A model that changes nothing is not what the gates were made for: they would hold it.
SETTINGS = NodeSettings.model_validate(
    {"gates": {"on_fail": "pass", "on_warn": "pass", "uncalibrated": "pass", "actions": {}}}
)

Make = Callable[[], Sequence[Dataset]]


@dataclass(frozen=True)
class Row:
    """One input: its name, what it is, and what became of it."""

    name: str
    kind: str
    outcomes: tuple[Outcome, ...]

    def lines(self) -> list[str]:
        """The outcomes in words; those that are alike as one line."""
        said = [described(outcome) for outcome in self.outcomes]
        counted = [(line, said.count(line)) for line in dict.fromkeys(said)]
        return [f"{line} (×{count})" if count > 1 else line for line, count in counted]


def described(outcome: Outcome) -> str:
    """One outcome in words."""
    if outcome.state != "derived":
        return f"{outcome.state}: {outcome.said}"
    what = f"restored, {len(outcome.made)} of {len(outcome.sources)} instances"
    return f"{what}; {outcome.said}" if outcome.said else what


def identity_engine(folder: Path) -> Engine:
    """The model of a bundle whose output is its input; the variant with the least work to do."""
    write_bundle(
        folder / "identity", quiet(small_model(variant="v1", channels=(2, 2, 2, 2))), FIELDS
    )
    return LocalEngine.open(str(folder / "identity"), device="cpu")


# --- real series ----------------------------------------------------------------------------


def real(shared: Path, name: str, engine: Engine) -> Row:
    """The row of one folder of the shared series."""
    paths = sorted((shared / name).glob("*.dcm"))
    return Row(name, kind_of(paths), tuple(go_through(paths, engine, SETTINGS)))


def real_names(shared: Path) -> list[str]:
    """The folders of the shared series."""
    return sorted(path.name for path in shared.iterdir() if path.is_dir())


def kind_of(paths: Sequence[Path]) -> str:
    """What the files are: classes, transfer syntaxes, matrix, vendor."""
    from pydicom import dcmread

    with quiet_pydicom():
        headers = [dcmread(path, stop_before_pixels=True) for path in paths]
    classes = _distinct(UID(text(h, "SOPClassUID")).name for h in headers)
    syntaxes = _distinct(h.file_meta.TransferSyntaxUID.name for h in headers)
    vendors = _distinct(text(h, "Manufacturer") for h in headers)
    return "; ".join(part for part in (classes, syntaxes, vendors) if part)


def _distinct(words: Iterable[str]) -> str:
    found = list(dict.fromkeys(word for word in words if word))
    return ", ".join(found[:2]) + (f" and {len(found) - 2} more" if len(found) > 2 else "")


# --- series by code -------------------------------------------------------------------------


def by_code() -> Mapping[str, Make]:
    """What is missing among the real series, and each signal of the policy alone."""
    return {
        **_scripts(),
        **_values(),
        **_volumes(),
        **_signals(),
        **_units(),
        **_syntaxes(),
        **_multiframe(),
    }


def _made(modality: Any, **options: Any) -> Make:
    shape = {"slices": 3, "rows": 24}
    return lambda: make_series(modality, **{**shape, **options})


def _scripts() -> dict[str, Make]:
    return {
        f"{modality}, patient's name: {script}": _made(modality, script=script)
        for script in NAMES
        for modality in ("CT", "PT")
    }


def _values() -> dict[str, Make]:
    return {
        "CT, 12 bits stored, signed": _made("CT", bits_stored=12),
        "CT, 12 bits stored, unsigned": _made("CT", bits_stored=12, signed=False),
        "CT, 16 bits stored, unsigned": _made("CT", signed=False),
        "CT, slope 0.5": _made("CT", slope=0.5),
        "CT, padding value and range": _made("CT", padding=-2000, padding_limit=-1990),
        "CT, no rescale": _made("CT", RescaleSlope=None, RescaleIntercept=None),
        "CT, slope without intercept": _made("CT", RescaleIntercept=None),
        "PT, no rescale": _made("PT", RescaleSlope=None, RescaleIntercept=None),
        "MR, 8 bits stored": _made("MR", bits_stored=8),
        "MR, signed": _made("MR", signed=True),
        "MR, rescale": _made("MR", slope=0.25),
        "MR, MONOCHROME1": _made("MR", PhotometricInterpretation="MONOCHROME1"),
        "PT, 8 bits stored": _made("PT", bits_stored=8, signed=False),
        "PT, one slope for all slices": _made("PT", slope_per_slice=False, slope=2.0),
    }


def _volumes() -> dict[str, Make]:
    return {
        "CT, gantry tilt 18°": _made("CT", tilt=18.0),
        "CT, coronal": _made("CT", plane="coronal"),
        "CT, oblique": _made("CT", plane="oblique"),
        "CT, one slice": _made("CT", slices=1),
        "CT, a slice missing": _made("CT", slices=6, missing=(3,)),
        "CT, a slice twice": _made("CT", slices=4, duplicated=(1,)),
        "CT, non-square pixels and matrix": _made("CT", columns=40, spacing=(0.7, 1.3)),
        "MR, coronal": _made("MR", plane="coronal"),
        "MR, sagittal": _made("MR", plane="sagittal"),
        "MR, oblique": _made("MR", plane="oblique"),
        "MR, two echoes": _joined("EchoTime", "20", "90"),
        "MR, two b-values": _joined("DiffusionBValue", 0.0, 800.0),
        "PT, two time frames": _joined("TemporalPositionIndex", 1, 2, modality="PT"),
    }


def _joined(keyword: str, *values: Any, modality: Any = "MR") -> Make:
    """Volumes of one series, told apart by an attribute."""

    def make() -> list[Dataset]:
        made = []
        for number, value in enumerate(values):
            options = {keyword: value, "InstanceNumber": None}
            for dataset in make_series(modality, slices=3, rows=24, seed=number, **options):
                dataset.SeriesInstanceUID = uid("joined", keyword)
                made.append(dataset)
        return made

    return make


def _signals() -> dict[str, Make]:
    return {
        "CT, localizer": _made("CT", localizer=True),
        "CT, ImageType DERIVED\\PRIMARY\\AXIAL": _typed("CT", "DERIVED", "PRIMARY", "AXIAL"),
        "CT, ImageType MPR": _typed("CT", "DERIVED", "SECONDARY", "MPR"),
        "CT, compressed with loss before": _made("CT", LossyImageCompression="01"),
        "CT, JPEG 2000 that may have lost": _irreversible(None),
        "CT, JPEG 2000 that says it lost nothing": _irreversible("00"),
        "CT, burned-in annotation": _made("CT", BurnedInAnnotation="YES"),
        "CT, no kernel": _made("CT", ConvolutionKernel=None),
        "CT, no positions": _made("CT", ImagePositionPatient=None),
        "CT, our own output": _made(
            "CT", Manufacturer="DiffCode", ManufacturerModelName="DiffCode DICOM node"
        ),
        "MR, ADC map": _typed("MR", "DERIVED", "PRIMARY", "ADC"),
        "MR, phase": _typed("MR", "ORIGINAL", "PRIMARY", "P"),
        "Secondary capture": _made("CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.7"),
        "Series Instance UID absent": _made("CT", SeriesInstanceUID=None),
    }


def _irreversible(stated: str | None) -> Make:
    """In the syntax of JPEG 2000 that allows loss, whatever the codestream is."""

    def make() -> list[Dataset]:
        options: dict[str, Any] = {
            "transfer_syntax": JPEG2000Lossless,
            "LossyImageCompression": stated,
        }
        made = make_series("CT", slices=3, rows=32, **options)
        for dataset in made:
            dataset.file_meta.TransferSyntaxUID = JPEG2000
        return made

    return make


def _typed(modality: Any, *words: str) -> Make:
    return _made(modality, ImageType=list(words))


def _units() -> dict[str, Make]:
    return {
        "PT, BQML": _made("PT"),
        "PT, GML": _made("PT", Units="GML", slope_per_slice=False, slope=0.001),
        "PT, BQML without weight": _made("PT", PatientWeight=None),
        "PT, BQML without decay correction": _made("PT", DecayCorrection="NONE"),
        "PT, CNTS without a factor": _made("PT", Units="CNTS"),
        "PT, CNTS with the vendor's SUV factor": _counts({0x00: "0.0005"}),
        "PT, CNTS with the vendor's activity factor": _counts({0x09: "1.7"}),
        "PT, PROPCPS": _made("PT", Units="PROPCPS"),
    }


def _counts(factors: Mapping[int, str]) -> Make:
    def make() -> list[Dataset]:
        datasets = make_series("PT", slices=3, rows=24, Units="CNTS")
        for dataset in datasets:
            block = dataset.private_block(0x7053, "Philips PET Private Group", create=True)
            for offset, factor in factors.items():
                block.add_new(offset, "DS", factor)
        return datasets

    return make


def _syntaxes() -> dict[str, Make]:
    syntaxes = (
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLSLossless,
        JPEG2000Lossless,
    )
    return {f"MR, {uid.name}": _made("MR", rows=32, transfer_syntax=uid) for uid in syntaxes}


def _multiframe() -> dict[str, Make]:
    options: dict[str, Any] = {"slices": 3, "rows": 24}
    kinds = {
        f"{modality}, {kind}": partial(make, modality, **options)
        for modality in ("CT", "MR", "PT")
        for kind, make in (("Enhanced", make_enhanced), ("Legacy Converted", legacy_converted))
    }
    return {name: lambda make=make: [make()] for name, make in kinds.items()}


def coded(name: str, make: Make, folder: Path, engine: Engine) -> Row:
    """The row of one series by code, whose files go into *folder*."""
    return Row(name, "", tuple(go_through(write_series(make(), folder), engine, SETTINGS)))


# --- the page -------------------------------------------------------------------------------


def page(real_rows: Iterable[Row], code_rows: Iterable[Row]) -> str:
    """The text of docs/input-table.md."""
    parts = [HEAD, "## Real series\n\n", *_table(real_rows, with_kind=True)]
    return "".join([*parts, "\n## Series by code\n\n", *_table(code_rows, with_kind=False)])


def section(text_of_page: str, title: str) -> str:
    """One of its two tables."""
    found = re.search(rf"## {title}\n\n(.*?)(\n## |\Z)", text_of_page, re.DOTALL)
    assert found is not None, title
    return found[1]


def _table(found: Iterable[Row], *, with_kind: bool) -> Iterator[str]:
    headings = ["Series", *(["What it is"] if with_kind else []), "What becomes of it"]
    yield f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}\n"
    yield from rows(found, with_kind=with_kind)


def rows(found: Iterable[Row], *, with_kind: bool) -> Iterator[str]:
    """The lines of a table."""
    for row in found:
        cells = [row.name, *([row.kind] if with_kind else []), "<br>".join(row.lines())]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main(shared: Path, target: Path) -> None:
    """Write the page from the real series in *shared*."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = identity_engine(folder)
        real_rows = [real(shared, each, engine) for each in real_names(shared)]
        code_rows = [
            coded(each, make, folder / str(number), engine)
            for number, (each, make) in enumerate(by_code().items())
        ]
    target.write_text(page(real_rows, code_rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
