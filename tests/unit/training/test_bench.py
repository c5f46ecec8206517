from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from restoration.blocks import NAFBlock
from training import bench
from training.bench import Machine, Outcome, Plan, Row
from training.cli.main import main
from training.peers import TransformerUNet, amir_sized, restormer_sized

# Rates at which a NAF block of the first level is bound by memory, and the search by operations.
FAST = Machine("imagined", "fp32", 1e14, 1e12)


def parameters(model: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def test_the_peers_have_the_size_of_those_that_are_published() -> None:
    assert parameters(restormer_sized()) == pytest.approx(26.12, abs=0.01)
    assert parameters(amir_sized()) == pytest.approx(23.54, rel=0.01)


@pytest.mark.parametrize("routed", [False, True])
def test_a_peer_starts_from_its_input_and_uses_it(routed: bool) -> None:
    model = TransformerUNet(8, (1, 1, 1, 1), 1, (1, 1, 2, 2), routed=routed).eval()
    x = torch.rand(2, 1, 16, 24)
    with torch.no_grad():
        changed = model(x)
        assert changed.shape == x.shape
        assert not torch.equal(changed, x)
        model.emit.weight.zero_()
        assert torch.equal(model(x), x)


def test_the_operations_of_the_paper_network_are_those_that_were_counted_by_hand() -> None:
    """Reference: 369.5 GMAC at 512² with the task classifier; less 1 % for the edges of kernels."""
    work = bench.count(bench.made("paper"), 512, FAST, 2)
    assert work.operations / 2e9 == pytest.approx(369.5, rel=0.015)
    # 48 blocks of nine tensors are most of it: 5.1 GB.
    assert 5.1e9 < work.octets < 6.5e9


def test_work_grows_with_the_pixels_and_the_bytes_of_a_value() -> None:
    model = bench.made("tiny")
    small, large = bench.count(model, 256, FAST, 4), bench.count(model, 512, FAST, 4)
    assert large.operations == pytest.approx(4 * small.operations)
    half = bench.count(model, 512, FAST, 2)
    assert half.operations == large.operations
    assert half.octets < 0.6 * large.octets


def test_the_least_time_is_that_of_the_slower_resource() -> None:
    model = bench.made("tiny")
    only_memory = bench.count(model, 256, Machine("", "fp32", 1e30, 1e9), 4)
    assert only_memory.least_seconds == pytest.approx(only_memory.octets / 1e9)
    only_operations = bench.count(model, 256, Machine("", "fp32", 1e9, 1e30), 4)
    assert only_operations.least_seconds == pytest.approx(only_operations.operations / 1e9)


def test_counting_leaves_the_model_and_its_hooks_alone() -> None:
    model = bench.made("tiny")
    bench.count(model, 256, FAST, 4)
    assert all(not module._forward_hooks for module in model.modules())
    assert any(isinstance(module, NAFBlock) for module in model.modules())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's rates as given: a large product has no place in a test."""
    monkeypatch.setattr(bench, "measure_machine", lambda device, dtype: FAST)


@pytest.mark.usefixtures("quick")
def test_a_run_measures_the_network_both_ways(tmp_path: Path) -> None:
    told: list[str] = []
    plan = Plan(("tiny",), "v2", (64,), ("fp32",), "cpu", 2, repeats=2)
    outcome = bench.run(plan, told.append)
    assert [row.how for row in outcome.rows] == ["plain", "as the node runs it: compiled kernels"]
    assert len(told) == 2
    for row in outcome.rows:
        assert row.batch == 2
        assert 0 < row.spread[0] <= row.slices_per_second <= row.spread[1]
        assert row.share is not None
        # FAST does ten thousand times what a machine for tests does.
        assert 0 < row.share < 1
        assert row.peak_bytes >= 0
    assert json.loads(json.dumps(outcome.to_dict()))["rows"][0]["network"] == "tiny, v2"


@pytest.mark.usefixtures("quick")
def test_a_peer_has_a_row_without_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its least work is nobody has counted: no share of the roofline is claimed."""
    monkeypatch.setitem(bench.PEERS, "small", lambda: TransformerUNet(8, (1, 1, 1, 1), 1))
    (row,) = bench.bench_peer("small", 64, FAST, torch.device("cpu"), Plan(batch=2, repeats=3))
    assert (row.network, row.how, row.size, row.batch) == ("small", "plain", 64, 2)
    assert (row.gmac, row.share) == (None, None)
    assert row.parameters == sum(p.numel() for p in bench.PEERS["small"]().parameters())
    slowest, fastest = row.spread
    assert 0 < slowest <= row.slices_per_second <= fastest


@pytest.mark.parametrize("size", [100, 32])
def test_a_size_that_the_network_cannot_take_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiples of 8, and 64 at least"):
        bench.run(Plan(("tiny",), sizes=(size,)), lambda row: None)


def test_a_measured_machine_has_rates() -> None:
    times = bench._times(lambda: torch.ones(1000).sum(), torch.device("cpu"), 3)
    assert len(times) == 3
    assert all(time > 0 for time in times)


def test_what_takes_long_is_repeated_three_times() -> None:
    cpu = torch.device("cpu")
    assert len(bench._times(lambda: None, cpu, 7, within=0.0)) == 3
    assert len(bench._times(lambda: None, cpu, 2, within=0.0)) == 2


def test_the_shipped_network_is_measured_once() -> None:
    assert Plan(("tiny",), shipped=True).networks == (("tiny", "full"), ("compact", "v2"))
    assert Plan(("compact",), "v2", shipped=True).networks == (("compact", "v2"),)


def test_large_networks_may_be_left_out_of_large_images() -> None:
    plan = Plan(large_up_to=256)
    assert [plan.takes(name, 512) for name in ("paper", "AMIR-sized", "tiny")] == [
        False,
        False,
        True,
    ]
    assert plan.takes("paper", 256)
    assert Plan().takes("paper", 4096)


OUTCOME = Outcome(
    (FAST,),
    (Row("tiny", "plain", "fp32", 64, 2, 1_970_000, 0.25, 3.0, (2.5, 3.5), 7_000_000, 0.42),),
)


def test_the_table_says_what_was_measured() -> None:
    text = bench.table(OUTCOME)
    assert "| tiny | plain | fp32 | 64 | 2 | 1.97 M | 0.2 | 3 | 2.5 – 3.5 | 7 | 42 % |" in text
    assert "| fp32 | 100 | 1000.0 |" in text


def test_a_section_takes_its_place_on_the_page_and_no_other(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("# Results\n\n<!-- other -->\nkept\n<!-- other -->\n")
    bench.write(page, "first")
    bench.write(page, "second\n")
    text = page.read_text()
    assert text.count("<!-- bench_restore -->") == 2
    assert "second" in text
    assert "first" not in text
    assert "<!-- other -->\nkept\n<!-- other -->" in text


@pytest.mark.usefixtures("quick")
def test_the_command_prints_one_object_and_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    words = ["bench", "--preset", "tiny", "--variant", "v1", "--size", "64", "--batch", "1"]
    words += ["--device", "cpu", "--precision", "fp32", "--repeats", "1", "--json"]
    done = CliRunner().invoke(main, [*words, "--write", str(page)])
    assert done.exit_code == 0, done.output
    assert {row["size"] for row in json.loads(done.stdout)["rows"]} == {64}
    assert "--preset tiny --variant v1 --size 64" in page.read_text()


def test_the_command_refuses_a_size_in_words() -> None:
    done = CliRunner().invoke(main, ["bench", "--size", "100"])
    assert done.exit_code == 1
    assert "multiples of 8" in done.stderr
