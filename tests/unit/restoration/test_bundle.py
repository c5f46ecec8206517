from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from restoration.bundle import (
    CARD,
    CONSISTENCY,
    MANIFEST,
    WEIGHTS,
    BundleError,
    Manifest,
    builtin,
    load_bundle,
    read_manifest,
    write_bundle,
)
from restoration.diffcode import DiffCode
from restoration.domain import TaskDomain

Make = Callable[..., DiffCode]


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of a manifest by hand; None removes one."""
    path = folder / MANIFEST
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def rewrite(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Replace the weights and keep the manifest's hash true."""
    save_file(state, folder / WEIGHTS)
    edit(folder, sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())


def test_what_is_written_is_what_is_read(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    model = make_model()
    domain = TaskDomain("CT", slice_thickness_mm=(0.5, 5.0), kernels_refused=("B7.*",))
    fields = manifest_fields | {
        "domain": {"ct_denoise": domain},
        "degradation": {"mri_sr": {"operator": "kspace-truncation", "version": 1}},
        "training_data": ({"name": "phantoms", "licence": "Apache-2.0"},),
        "metrics": {"protocol": "fixed", "psnr": (1.0, 2.0)},
    }
    written = write_bundle(tmp_path / "b", model, fields, "# A card\n", half=False)
    manifest, loaded = load_bundle(tmp_path / "b")
    assert manifest == written == read_manifest(tmp_path / "b")
    assert manifest.domain["ct_denoise"] == domain
    assert manifest.variant == "full"
    assert (tmp_path / "b" / CARD).read_text() == "# A card\n"
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_the_model_is_opened_for_inference(bundle: Path) -> None:
    _, model = load_bundle(bundle)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_half_precision_is_stored_and_single_is_loaded(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    model = make_model()
    manifest = write_bundle(tmp_path / "b", model, manifest_fields)
    assert manifest.dtype == "float16"
    assert {t.dtype for t in load_file(tmp_path / "b" / WEIGHTS).values()} == {torch.float16}
    _, loaded = load_bundle(tmp_path / "b")
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value.half().float()), name


@pytest.mark.parametrize("variant", ["v1", "v2", "v3", "full"])
def test_each_variant_stores_the_parts_it_has(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any], variant: str
) -> None:
    write_bundle(tmp_path / "b", make_model(variant=variant), manifest_fields)
    parts = {name.split(".")[0] for name in load_file(tmp_path / "b" / WEIGHTS)}
    wanted = {
        "v1": {"backbone"},
        "v2": {"backbone", "classifier"},
        "v3": {"backbone", "classifier", "condition", "bank", "decoder"},
        "full": {"backbone", "classifier", "condition", "bank", "decoder", "prior"},
    }
    assert parts == wanted[variant]
    manifest, model = load_bundle(tmp_path / "b")
    assert manifest.variant == model.config.variant == variant


def test_the_encoder_of_the_training_targets_is_not_stored(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    model = DiffCode(make_model().config, with_vq_encoder=True)
    write_bundle(tmp_path / "b", model, manifest_fields)
    assert not any(name.startswith("vq_encoder") for name in load_file(tmp_path / "b" / WEIGHTS))


def test_loading_leaves_the_random_numbers_of_the_program_alone(bundle: Path) -> None:
    state = torch.random.get_rng_state()
    load_bundle(bundle)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_mr_data_consistency_is_on_unless_the_fields_say_otherwise(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    on = write_bundle(tmp_path / "on", make_model(), manifest_fields)
    off = write_bundle(tmp_path / "off", make_model(), manifest_fields | {"data_consistency": {}})
    ct = write_bundle(tmp_path / "ct", make_model(), manifest_fields | {"tasks": ["ct_denoise"]})
    assert on.data_consistency == {"mri_sr": CONSISTENCY}
    assert off.data_consistency == ct.data_consistency == {}


def test_the_same_bundle_may_be_written_again(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    folder = tmp_path / "b"
    first = write_bundle(folder, make_model(), manifest_fields | {"created": "2020-01-01"}, "card")
    again = write_bundle(folder, make_model(), manifest_fields, "card")
    assert again == first


def test_another_bundle_is_never_overwritten_unasked(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    folder = tmp_path / "b"
    first = write_bundle(folder, make_model(seed=1), manifest_fields, "card")
    with pytest.raises(BundleError, match=r"holds another bundle, test 1\.0"):
        write_bundle(folder, make_model(seed=2), manifest_fields, "card")
    with pytest.raises(BundleError, match="another bundle"):
        write_bundle(folder, make_model(seed=1), manifest_fields, "another card")
    assert load_bundle(folder)[0] == first
    second = write_bundle(folder, make_model(seed=2), manifest_fields, overwrite=True)
    assert load_bundle(folder)[0] == second != first
    assert not (folder / CARD).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_that_is_no_bundle_is_never_replaced(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("precious")
    with pytest.raises(BundleError, match=r"manifest\.json: No such file"):
        write_bundle(folder, make_model(), manifest_fields, overwrite=True)
    assert (folder / "chapter1.txt").read_text() == "precious"


def test_an_empty_folder_is_filled(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    (tmp_path / "b").mkdir()
    written = write_bundle(tmp_path / "b", make_model(), manifest_fields)
    assert load_bundle(tmp_path / "b")[0] == written


def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_bundle(tmp_path / "b", make_model(), manifest_fields, "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_half_precision_are_refused(
    tmp_path: Path, make_model: Make, manifest_fields: dict[str, Any]
) -> None:
    model = make_model()
    with torch.no_grad():
        model.backbone.emit.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(BundleError, match=r"backbone\.emit\.weight: not finite as torch\.float16"):
        write_bundle(tmp_path / "b", model, manifest_fields)
    write_bundle(tmp_path / "b", model, manifest_fields, half=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": []}, "at least one"),
        ({"tasks": ["ct_denoise", "ct_denoise"]}, "once"),
        ({"tasks": ["ct"]}, "'ct' is not a valid"),
        ({"flavour": "mint"}, "unknown key in manifest: flavour"),
        ({"domain": {"ct_denoise": {"modality": "CT", "kernel": "x"}}}, "in domain: kernel"),
        ({"metrics": {"psnr": float("nan")}}, "not JSON compliant"),
        (
            {"tasks": ["ct_denoise"], "guards": {"mri_sr": {"mean_drift": 1.0}}},
            "unknown key in guards: mri_sr",
        ),
    ],
)
def test_wrong_manifest_fields_are_named(
    tmp_path: Path,
    make_model: Make,
    manifest_fields: dict[str, Any],
    fields: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(BundleError, match=message):
        write_bundle(tmp_path / "b", make_model(), manifest_fields | fields)
    assert not (tmp_path / "b").exists()


def test_a_changed_byte_of_the_weights_is_found(bundle: Path) -> None:
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"model\.safetensors: SHA-256 is [0-9a-f]{64}, the man"):
        load_bundle(bundle)


def test_weights_that_are_no_safetensors_are_refused(bundle: Path) -> None:
    (bundle / WEIGHTS).write_bytes(b"\x80\x04pickled")
    edit(bundle, sha256=hashlib.sha256(b"\x80\x04pickled").hexdigest())
    with pytest.raises(BundleError, match=r"model\.safetensors: .*header"):
        load_bundle(bundle)


def test_missing_files_are_named(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere.manifest\.json: No such file"):
        load_bundle(tmp_path / "nowhere")
    (bundle / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"model\.safetensors: No such file"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2; this release reads 1"),
        ({"format_version": None}, "format_version is None"),
        ({"sha256": None}, "sha256"),
        ({"extra": 1}, "unknown key in manifest: extra"),
        ({"tasks": ["ct_denoise", "xray"]}, "task 'xray' is not one of mri_sr, ct_denoise"),
        ({"tasks": 7}, "not iterable"),
        ({"domain": ["CT"]}, "items"),
        ({"normalisation": {}}, "normalisation of mri_sr is not"),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused(
    bundle: Path, changes: dict[str, Any], message: str
) -> None:
    edit(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        read_manifest(bundle)


def test_a_model_of_another_window_is_refused(bundle: Path) -> None:
    values = json.loads((bundle / MANIFEST).read_text())["normalisation"]
    values["ct_denoise"]["window"] = [-1000.0, 1000.0]
    edit(bundle, normalisation=values)
    with pytest.raises(BundleError, match="normalisation of ct_denoise"):
        load_bundle(bundle)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"colour": 1}, "config: unknown configuration"), ({"variant": "v9"}, "config: variant")],
)
def test_a_config_that_the_network_does_not_know_is_refused(
    bundle: Path, change: dict[str, Any], message: str
) -> None:
    edit(bundle, config=read_manifest(bundle).config | change)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_weights_that_do_not_fit_the_config_are_named(bundle: Path) -> None:
    state = load_file(bundle / WEIGHTS)
    lost = state.pop("backbone.emit.bias")
    state["backbone.emit.bais"] = lost
    state["bank.weight"] = state["bank.weight"][:, :4].contiguous()
    rewrite(bundle, state)
    with pytest.raises(BundleError) as caught:
        load_bundle(bundle)
    message = str(caught.value)
    assert "lacks backbone.emit.bias" in message
    assert "has unknown backbone.emit.bais" in message
    assert "bank.weight is (3, 4, 8), the config says (3, 16, 8)" in message


def test_a_long_list_of_misfits_is_cut(bundle: Path) -> None:
    rewrite(bundle, {"only": torch.zeros(1)})
    with pytest.raises(BundleError, match=r"; and \d+ more$"):
        load_bundle(bundle)


def test_an_unknown_builtin_bundle_is_named() -> None:
    with pytest.raises(BundleError, match="No built-in bundle is called 'nonesuch'"):
        builtin("nonesuch")


def test_a_manifest_needs_its_identity() -> None:
    with pytest.raises(TypeError):
        Manifest.from_dict({"format_version": 1, "name": "x"})
