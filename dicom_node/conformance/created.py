"""The instances that the node makes: what each attribute becomes, codes, UIDs, character sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydicom.charset import python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.uid import UID

from dicom_node.conformance.markdown import table
from dicom_node.dicom import policy, provenance, structured_report
from dicom_node.dicom.header import PRIVATE_SCHEME
from dicom_node.dicom.image_classes import CLASSES, Kind
from dicom_node.dicom.policy import Action, Rule
from dicom_node.dicom.values import VALUES
from dicom_node.settings import NodeSettings

__all__ = ["annex", "character_sets"]


def character_sets() -> Iterator[str]:
    """The Specific Character Sets that are read and written."""
    yield "## 5 Extended character sets"
    yield (
        "An instance is stored whatever its Specific Character Set. A restored instance has that of"
        " its source, and the texts of its source in it. These are read; text in another one is"
        " read as ISO-IR 6:"
    )
    extended = [term for term in python_encoding if "2022" in term]
    single = [term for term in python_encoding if term and "2022" not in term]
    yield table(
        ["Kind", "Defined terms"],
        [
            ["without code extensions", ", ".join(single)],
            ["with code extensions", ", ".join(extended)],
        ],
    )


def annex(settings: NodeSettings) -> Iterator[str]:
    """The annex: created SOP Instances, codes, private attributes, UIDs."""
    yield "## 7 Created SOP Instances"
    yield (
        "A restored instance is of the class of its source. Its attributes follow one table for"
        " each class, which the program itself writes by. *Copy*: value for value, where the"
        " source has it. *Set*: given by the restoration. *Recompute*: where the source has it."
        " *Drop*: not written. What no table names is dropped, and so is every private attribute"
        " but those of 7.5."
    )
    for number, (uid, image) in enumerate(CLASSES.items(), start=1):
        yield f"### 7.1.{number} {UID(uid).name}"
        yield from _created(policy.table(uid), classic=image.kind is Kind.CLASSIC)
    yield from _other_objects(settings)
    yield from _codes()
    yield from _identifiers(settings)
    yield from _private()
    yield "### 7.6 Private SOP Classes and transfer syntaxes"
    yield "None. No standard class is specialized; private coding scheme: 7.3."


def _created(rules: Mapping[str, Rule], *, classic: bool) -> Iterator[str]:
    modules: dict[tuple[str, str], list[Rule]] = {}
    for rule in rules.values():
        if "." not in rule.path and rule.action is Action.COPY:
            modules.setdefault((rule.module, rule.clause), []).append(rule)
    what = "Module" if classic else "Module or functional group"
    yield table(
        [what, "PS3.3", "Attributes copied", "Written empty where the source lacks them"],
        [
            [module, clause, len(lines), _keywords(rule for rule in lines if rule.empty)]
            for (module, clause), lines in sorted(modules.items())
        ],
    )
    yield "Attributes that are not copied:"
    yield table(
        ["Attribute", "Tag", "PS3.3", "Action", "Value"],
        [
            [rule.path, _tag(rule.path), rule.clause, rule.action.value, _made_by(rule)]
            for rule in sorted(rules.values(), key=lambda rule: (rule.action.value, rule.path))
            if rule.action in (Action.SET, Action.RECOMPUTE)
        ],
    )
    dropped = [rule for rule in rules.values() if rule.action is Action.DROP]
    yield f"Dropped: {_keywords(dropped)}."


def _keywords(rules: Iterator[Rule] | Sequence[Rule]) -> str:
    return ", ".join(sorted(rule.path for rule in rules)) or "–"


def _tag(path: str) -> str:
    tag = tag_for_keyword(path.rpartition(".")[2])
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})" if tag is not None else ""


def _made_by(rule: Rule) -> str:
    """What the function that makes the value says of itself, in one line."""
    function = VALUES.get(rule.by)
    described = (getattr(function, "__doc__", None) or "").strip().partition("\n")[0]
    return described.rstrip(".")


def _other_objects(settings: NodeSettings) -> Iterator[str]:
    report = settings.report
    yield "### 7.2 Reports and presentation states"
    yield (
        f"Enhanced SR (TID 1500, TID 4019): {_made(report.sr)}. Grayscale Softcopy Presentation"
        f" State with the text “{report.text}” in a graphic layer of its own: {_made(report.gsps)}."
        " Each is a series of its own in the study of the source, with our equipment, the"
        " patient's and the study's attributes of the source, and references to all restored"
        " instances; the report refers to the source's instances as well. A presentation state"
        " carries the rescale and windows of its images, which makes one for each rescale."
    )
    yield (
        "Key Object Selection Document (TID 2010): a rejection note as IHE RAD IOCM has it, made"
        " when an operator recalls a model. Title (113001, DCM, “Rejected for Quality Reasons”)"
        " with modifier (111219, DCM, “Inappropriate image processing”), or (113037, DCM,"
        " “Rejected for Patient Safety Reasons”). One for each restored series, in a series of its"
        " own of the same study; it refers to all restored instances, and to their report and"
        " presentation states, and is sent where any of them was stored."
    )


def _made(wanted: bool) -> str:
    return "made" if wanted else "not made in this configuration"


def _codes() -> Iterator[str]:
    yield "### 7.3 Codes"
    yield (
        f"Coding scheme designator `{PRIVATE_SCHEME}`, declared in Coding Scheme Identification"
        " Sequence. Standard codes are those of PS3.16: 121322 for the source image, 109101 and"
        " 109102 for contributing equipment, 113085 where the grid was made finer."
    )
    steps = [provenance.derivation_code(task) for task in ("ct_denoise", "mri_sr", "pet_synthesis")]
    tables = (
        structured_report.MEASURES,
        structured_report.VERDICTS,
        structured_report.SERIES_ROLES,
        structured_report.CONCEPTS,
    )
    yield table(
        ["Code Value", "Code Meaning", "Where"],
        [
            *(
                [step.CodeValue, step.CodeMeaning, "Derivation Code Sequence (CID 7203)"]
                for step in steps
            ),
            *(
                [value, meaning, "Enhanced SR"]
                for codes in tables
                for value, meaning in codes.values()
            ),
        ],
    )


def _identifiers(settings: NodeSettings) -> Iterator[str]:
    identity = settings.identity
    root = identity.uid_root or "2.25"
    yield "### 7.4 Identifiers and labels"
    suffixes = ", ".join(f"{task} “{words}”" for task, words in _suffixes(settings).items())
    yield table(
        ["", "Value"],
        [
            ["Root of created UIDs", f"{root} (a version 5 UUID of source, task, weights, grid)"],
            ["Implementation Class UID in created files", provenance.IMPLEMENTATION_CLASS_UID],
            ["… Version Name", provenance.IMPLEMENTATION_VERSION_NAME],
            ["Series Number", f"that of the source + {identity.series_number_offset}"],
            [
                "… of reports and presentation states",
                f"… + {settings.report.series_number_offset} and"
                f" {settings.report.series_number_offset + 1}",
            ],
            ["Appended to Series Description", suffixes],
            ["Content Qualification", identity.content_qualification],
            ["Manufacturer, Model Name", f"{identity.equipment.manufacturer}, "
             f"{identity.equipment.model_name}"],
            ["Extra values of Image Type", "none"],
        ],
    )  # fmt: skip


def _suffixes(settings: NodeSettings) -> Mapping[str, str]:
    return {str(task): words for task, words in settings.identity.description_suffixes.items()}


def _private() -> Iterator[str]:
    yield "### 7.5 Private attributes that are kept"
    yield "No private attribute is created. These of the source are kept, found by their creator:"
    yield table(
        ["Modality", "Private creator", "Element", "Meaning"],
        [
            [modality, rule.creator, f"({rule.group:04X},xx{rule.offset:02X})", rule.meaning]
            for modality, rules in policy.PRIVATE_KEPT.items()
            for rule in rules
        ],
    )
