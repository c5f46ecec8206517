"""Real series of three modalities, from DCMTK through a served node into Orthanc, and read back."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom import dcmread
from pydicom.dataset import Dataset

from restoration.kspace import truncate
from tests.integration.peers import STORESCU, Orthanc
from tests.integration.served import ServedNode, initialise, served, write_tiny_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.orthanc,
    pytest.mark.dcmtk,
    pytest.mark.timeout(1200),
]

SERIES = {
    "CT": ("ct_ge_petct_lowdose", 10),
    "PT": ("pet_ge_slope_per_slice", 40),
    "MR": ("mr_siemens_t2_tse", 8),
}


def truncated_copy(source: Path, target: Path, factor: int = 4) -> Path:
    """A copy of an MR series of which only the central part of k-space was acquired."""
    target.mkdir()
    for path in sorted(source.rglob("*")):
        if not path.is_file():
            continue
        dataset = dcmread(path)
        image = torch.from_numpy(dataset.pixel_array.astype(np.float32))
        low = truncate(image, factor).numpy()
        limit = np.iinfo(dataset.pixel_array.dtype).max
        dataset.PixelData = np.rint(low).clip(0, limit).astype(dataset.pixel_array.dtype).tobytes()
        dataset.save_as(target / path.name)
    return target


def store(node: ServedNode, folder: Path) -> None:
    address = ["-aec", "DIFFCODE", "127.0.0.1", str(node.port)]
    done = subprocess.run(
        [STORESCU, *address, "+sd", "+r", str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def headers(folder: Path) -> list[Dataset]:
    return [
        dcmread(path, stop_before_pixels=True)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def check(sources: Sequence[Dataset], stored: Sequence[Dataset]) -> None:
    """*stored* is one new series of the same patient, study and frame of reference."""
    by_uid = {source.SOPInstanceUID: source for source in sources}
    assert len(stored) == len(by_uid)
    assert len({each.SeriesInstanceUID for each in stored}) == 1
    for made in stored:
        source = by_uid.pop(made.SourceImageSequence[0].ReferencedSOPInstanceUID)
        for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
            assert made.get(keyword) == source.get(keyword), keyword
        assert made.ImagePositionPatient == source.ImagePositionPatient
        assert made.SeriesInstanceUID != source.SeriesInstanceUID
        assert made.SOPInstanceUID != source.SOPInstanceUID
        assert (made.Rows, made.Columns) == (source.Rows, source.Columns)
        assert np.isfinite(made.pixel_array).all()
    assert by_uid == {}


def test_three_real_series_arrive_restored_in_orthanc(
    tmp_path: Path, shared_data: Path, orthanc: Orthanc
) -> None:
    folders = {m: shared_data / "dicom" / name for m, (name, _) in SERIES.items()}
    folders["MR"] = truncated_copy(folders["MR"], tmp_path / "mr")
    to = {"pacs": f"ORTHANC@127.0.0.1:{orthanc.dicom_port}"}
    config = initialise(tmp_path / "n", write_tiny_bundle(tmp_path / "tiny"), to)
    sources = {modality: headers(folder) for modality, folder in folders.items()}
    with served(config) as node:
        for folder in folders.values():
            store(node, folder)
        series = [str(each[0].SeriesInstanceUID) for each in sources.values()]
        node.wait_for_delivery(*series, limit_s=900)
        jobs = node.ask("jobs", "list")
        code, seconds = node.stop()
    assert (code, seconds < 10) == (0, True)
    assert sorted(job["instances"] for job in jobs) == sorted(n for _, n in SERIES.values())
    assert all(min(job["seconds"].values()) > 0 for job in jobs)
    arrived = [dcmread(BytesIO(data)) for data in orthanc.files().values()]
    for modality, expected in sources.items():
        check(expected, [each for each in arrived if each.Modality == modality])
