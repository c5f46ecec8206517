"""docs/training.md followed to the letter on small files of the same form."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dicom_node.inference import LocalEngine, RestorationRequest
from restoration.bundle import read_manifest
from tests.training.tiny import tiny_recipe
from tests.unit.training.test_cli import recipe_file
from tests.unit.training.test_public_sets import fdg, ixi, ldct
from training.cli.main import main
from training.manifest import PreparedManifest


def commands(page: Path) -> list[list[str]]:
    """The shell block of "From nothing to a bundle", one list of words per command."""
    section = page.read_text(encoding="utf-8").split("## From nothing to a bundle")[1]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    lines = block.group(1).replace("\\\n", " ").strip().splitlines()
    return [shlex.split(line) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_give_a_bundle_that_the_node_restores_with(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ixi(tmp_path / "IXI-T2")
    for make in (ldct, fdg):
        (folder,) = (p for p in make(tmp_path / make.__name__).iterdir() if p.is_dir())
        folder.rename(tmp_path / folder.name)
    # Only the size of the training differs from the page.
    small = str(recipe_file(tmp_path, tiny_recipe(data={"simulated_pet": 0.5})))
    listed = commands(repository / "docs" / "training.md")
    assert [words[1] for words in listed] == ["prepare", "train", "bundle", "evaluate", "bundle"]
    for words in listed:
        assert words[0] == "diffcode"
        arguments = [small if word == "compact" else word for word in words[1:]]
        out = None
        if ">" in arguments:
            arguments, out = arguments[: arguments.index(">")], arguments[-1]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, (words, done.stderr)
        if out is not None:
            Path(out).write_text(done.stdout, encoding="utf-8")

    prepared = PreparedManifest.read(Path("prepared"))
    assert {item.task for item in prepared.items} == {"mri_sr", "ct_denoise", "pet_synthesis"}
    assert any(item.acquired_lq for item in prepared.items)
    manifest = read_manifest(Path("my-bundle"))
    assert manifest.variant == "v2"
    assert {source["name"] for source in manifest.training_data} >= {"IXI-T2"}
    assert set(manifest.metrics["tasks"]) == {"mri_sr", "ct_denoise", "pet_synthesis"}

    engine = LocalEngine.open(str(tmp_path / "my-bundle"), device="cpu")
    array = np.random.default_rng(0).normal(40, 20, (2, 64, 64)).astype(np.float32)
    result = engine.restore(RestorationRequest(array, "ct_denoise", (5.0, 0.7, 0.7), (1, 2)))
    assert result.array.shape == array.shape
    assert np.isfinite(result.array).all()
    assert result.model.name == "mine"
