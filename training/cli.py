"""The ``diffcode`` command: prepare data, train the stages, inspect, evaluate, bundle, restore."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch

    from training.recipe import Recipe
    from training.stages import Stage

Command = TypeVar("Command", bound=Callable[..., Any])
VARIANTS = ("v1", "v2", "v3", "full")
TASKS = ("mri_sr", "ct_denoise", "pet_synthesis")
FOLDER = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)


class Refused(click.ClickException):
    """The command was understood and not carried out; exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.echo(f"diffcode: {self.message}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    """Train, evaluate and use DiffCode restoration models."""


@main.group()
def train() -> None:
    """Train one stage; the same command again resumes it.

    \b
    diffcode train codebook    --recipe compact --data prepared --out run     Stage I
    diffcode train diffusion   --recipe compact --data prepared --out run     Stage II
    diffcode train restoration --recipe compact --data prepared --out run     Stage III
    diffcode train restoration --recipe compact --variant v2 --data prepared --out run

    The variants v1 and v2 need Stage III alone. SIGTERM, SIGINT and --max-seconds save and exit 0.
    """


def _train_options(command: Command) -> Command:
    options = [
        click.option("--recipe", default="compact", show_default=True, help="preset or TOML file"),
        click.option("--data", required=True, type=FOLDER, help="prepared folder"),
        click.option("--out", required=True, type=FOLDER, help="run folder"),
        click.option("--variant", type=click.Choice(VARIANTS), help="rung of the ladder"),
        click.option("--steps", type=click.IntRange(1), help="planned steps of the stage, in all"),
        click.option("--max-seconds", type=click.FloatRange(0), help="save and stop after this"),
        click.option("--seed", type=int, help="instead of the recipe's"),
        click.option("--threads", type=click.IntRange(1), help="CPU threads"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda"),
        click.option("--init-from", type=FOLDER, help="run or bundle that Stage III starts from"),
        click.option("--force", is_flag=True, help="go on past a gate or a changed schedule"),
    ]
    return functools.reduce(lambda inner, option: option(inner), reversed(options), command)


def _register(name: str, text: str) -> None:
    @train.command(name, help=text, short_help=text)
    @_train_options
    @_refusing
    def command(**options: Any) -> None:
        from training.stages import Stage

        _train(Stage(name), **options)


def _refusing(command: Command) -> Command:
    """What the libraries refuse becomes one line on stderr and exit code 1."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        from restoration.bundle import RestorationError
        from training.checkpoint import TrainingError

        try:
            command(*arguments, **options)
        except (TrainingError, RestorationError, ValueError, TypeError, OSError) as error:
            raise Refused(str(error)) from error

    return guarded  # type: ignore[return-value]


_register("codebook", "Stage I: VQ autoencoder and codebook bank, Eq. 3")
_register("diffusion", "Stage II: condition encoder and latent diffusion, Eq. 6")
_register("restoration", "Stage III: backbone, routing and classifier, Eq. 7")


def _train(
    stage: Stage,
    *,
    recipe: str,
    data: Path,
    out: Path,
    variant: str | None,
    steps: int | None,
    max_seconds: float | None,
    seed: int | None,
    threads: int | None,
    device: str,
    init_from: Path | None,
    force: bool,
) -> None:
    from rich.console import Console

    from training import run
    from training.loop import Limits

    chosen = _device(device, threads)
    settled = _settle(recipe, stage, variant, steps, seed, init_from)
    console = Console(stderr=True)
    outcome, checks = run.train(
        stage,
        settled,
        data,
        out,
        device=chosen,
        limits=Limits(max_seconds=max_seconds),
        force=force,
        console=console,
    )
    done = "finished" if outcome.finished else "paused; the same command goes on"
    console.print(f"{stage.value}: step {outcome.step} of {stage.settings(settled).steps}, {done}")
    for check in checks:
        console.print(str(check), markup=False)


def _settle(
    source: str,
    stage: Stage,
    variant: str | None,
    steps: int | None,
    seed: int | None,
    init_from: Path | None,
) -> Recipe:
    """The recipe with the command line's changes, checked again."""
    from training.recipe import Recipe

    values = Recipe.load(source).to_dict()
    if variant is not None:
        values["arch"]["variant"] = variant
    if steps is not None:
        values[stage.table]["steps"] = steps
    if seed is not None:
        values["seed"] = seed
    if init_from is not None:
        values["stage3"]["init_from"] = str(init_from)
    return Recipe.from_dict(values, source=source)


def _device(name: str, threads: int | None = None) -> torch.device:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@main.command()
@click.argument("sources", nargs=-1, required=True, type=EXISTING)
@click.option("--out", required=True, type=FOLDER, help="folder to make; must not exist")
@click.option("--seed", default=0, show_default=True, help="of the simulated noise")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="only this; repeat")
@click.option("--max-slices", type=click.IntRange(1), help="at most so many of a series")
@click.option("--no-simulated-pet", is_flag=True, help="no simulated FDG on the CT anatomy")
@_refusing
def prepare(
    sources: tuple[Path, ...],
    out: Path,
    seed: int,
    tasks: tuple[str, ...],
    max_slices: int | None,
    no_simulated_pet: bool,
) -> None:
    """Degrade images by physics into training pairs.

    SOURCES are .medz packs, NIfTI files, or folders of those or of DICOM series. Files named
    val_... are held out; without any, a seeded tenth of the subjects is.

    \b
    diffcode prepare data/train data/train_ext --out prepared
    """
    from restoration.tasks import RestorationTask
    from training.prepare import PrepareOptions
    from training.prepare import prepare as make_pairs

    options = PrepareOptions(max_slices=max_slices, simulated_pet=not no_simulated_pet)
    chosen = [RestorationTask(task) for task in tasks or TASKS]
    with _progress("preparing") as progress:
        manifest = make_pairs(
            sources, out, seed=seed, tasks=chosen, options=options, progress=progress
        )
    for line in manifest.skipped:
        click.echo(f"left out: {line}", err=True)
    click.echo(f"{len(manifest.items)} pairs in {out}", err=True)


@main.group()
def codebook() -> None:
    """Look into a run's codebooks, or make them anew."""


_TOKENS = click.option(
    "--tokens", default=200_000, show_default=True, type=click.IntRange(1), help="per task"
)


@codebook.command()
@click.argument("run", type=EXISTING)
@click.option("--data", required=True, type=EXISTING, help="prepared folder")
@_TOKENS
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of a table")
@_refusing
def inspect(run: Path, data: Path, tokens: int, as_json: bool) -> None:
    """Usage, perplexity and what each depth leaves over, on training images.

    \b
    diffcode codebook inspect run --data prepared
    """
    from training import report
    from training import run as runs
    from training.slices import PreparedSet
    from training.stages import Stage

    model, recipe = runs.trained_model(run / Stage.CODEBOOK.folder("full"))
    found = runs.inspect_codebooks(model, recipe, PreparedSet.open(data), tokens)
    _show(report.codebook_dict(found), report.codebook_table(found), as_json)


@codebook.command()
@click.argument("run", type=EXISTING)
@click.option("--data", required=True, type=EXISTING, help="prepared folder")
@click.option("--out", required=True, type=FOLDER, help="run folder to make")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="only this; repeat")
@_TOKENS
@click.option("--passes", default=4, show_default=True, type=click.IntRange(0), help="refinements")
@_refusing
def build(
    run: Path, data: Path, out: Path, tasks: tuple[str, ...], tokens: int, passes: int
) -> None:
    """Make codebooks anew by residual k-means, the networks of Stage I unchanged.

    \b
    diffcode codebook build run --data prepared --out run-new --task ct_denoise
    """
    from rich.console import Console

    from restoration.tasks import RestorationTask
    from training import report
    from training import run as runs

    chosen = [RestorationTask(task) for task in tasks or TASKS]
    found, checks = runs.rebuild_codebooks(
        run, data, out, tasks=chosen, tokens=tokens, passes=passes
    )
    _show({}, report.codebook_table(found), as_json=False)
    for check in checks:
        Console(stderr=True).print(str(check), markup=False)


@main.command()
@click.option("--data", required=True, type=EXISTING, help="prepared folder, or one of .medz packs")
@click.option("--split", default="val", show_default=True, type=click.Choice(["train", "val"]))
@click.option("--bundle", default="compact", show_default=True, help="built-in name or folder")
@click.option("--task", "tasks", multiple=True, type=click.Choice(TASKS), help="only this; repeat")
@click.option("--all-contrasts", is_flag=True, help="MR beyond T2")
@click.option("--no-classical", is_flag=True, help="leave the classical method out")
@click.option("--csv", "csv_path", type=FOLDER, help="write the values of each slice")
@click.option("--figures", type=FOLDER, help="folder for pictures, one per task")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the table")
@click.option("--threads", type=click.IntRange(1), help="CPU threads")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda")
@_refusing
def evaluate(
    data: Path,
    split: str,
    bundle: str,
    tasks: tuple[str, ...],
    all_contrasts: bool,
    no_classical: bool,
    csv_path: Path | None,
    figures: Path | None,
    as_json: bool,
    threads: int | None,
    device: str,
) -> None:
    """PSNR, SSIM and RMSE of a bundle, its input and the best classical method.

    \b
    diffcode evaluate --data prepared --bundle my-bundle --figures pictures
    diffcode evaluate --data packs --json > evaluation.json
    """
    from restoration.restorer import Restorer
    from restoration.tasks import RestorationTask
    from training import report
    from training.evaluate import MR_CONTRASTS, prepared, tuned_methods
    from training.evaluate import evaluate as judge

    chosen = [RestorationTask(task) for task in tasks or TASKS]
    restorer = Restorer.open(bundle, device=device, threads=threads)

    def restore(volume: Any, item: Any) -> Any:
        return restorer.restore(volume, item.task, spacing=item.spacing_mm).volume

    with _progress("preparing") as show, prepared(data, split, show) as dataset:
        methods = {} if no_classical else tuned_methods(dataset, chosen)
        with _progress("evaluating") as progress:
            evaluation = judge(
                dataset,
                restore,
                split=split,
                tasks=chosen,
                contrasts=() if all_contrasts else MR_CONTRASTS,
                methods=methods,
                progress=progress,
            )
        if csv_path is not None:
            report.write_csv(evaluation, csv_path)
        if figures is not None:
            report.write_figures(dataset, restore, methods, evaluation.tasks, split, figures)
    summary = evaluation.to_dict()
    _show(summary, report.evaluation_table(summary), as_json)


@main.command()
@click.argument("run", type=EXISTING)
@click.argument("out", type=FOLDER)
@click.option("--data", required=True, type=EXISTING, help="prepared folder of the training")
@click.option("--variant", type=click.Choice(VARIANTS), help="when the run holds several")
@click.option("--name", default="compact", show_default=True)
@click.option("--version", default="1", show_default=True)
@click.option("--licence", default="Apache-2.0", show_default=True, help="of the weights")
@click.option("--card", type=EXISTING, help="model card in Markdown")
@click.option("--metrics", type=EXISTING, help="what evaluate --json printed")
@click.option("--domain", type=EXISTING, help="TOML with a table per task, over what the data say")
@click.option("--overwrite", is_flag=True, help="replace the bundle in OUT")
@_refusing
def bundle(
    run: Path,
    out: Path,
    data: Path,
    variant: str | None,
    name: str,
    version: str,
    licence: str,
    card: Path | None,
    metrics: Path | None,
    domain: Path | None,
    overwrite: bool,
) -> None:
    """Write the averaged weights of a run as a bundle for the node.

    \b
    diffcode bundle run my-bundle --data prepared --variant v2 --name mine --card card.md
    """
    from training import export

    manifest = export.export_bundle(
        run,
        out,
        data,
        variant=variant,
        fields={"name": name, "version": version, "licence": licence},
        card=card.read_text(encoding="utf-8") if card else None,
        metrics=json.loads(metrics.read_text(encoding="utf-8")) if metrics else {},
        domain=domain,
        overwrite=overwrite,
    )
    click.echo(f"{out}: {manifest.name} {manifest.version}, {manifest.variant}, {manifest.sha256}")


@main.command()
@click.argument("source", metavar="IN", type=EXISTING)
@click.argument("out", metavar="OUT", type=FOLDER)
@click.option("--task", required=True, type=click.Choice(TASKS))
@click.option("--bundle", default="compact", show_default=True, help="built-in name or folder")
@click.option("--strength", default=1.0, show_default=True, type=click.FloatRange(0, 1))
@click.option("--threads", type=click.IntRange(1), help="CPU threads")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda")
@_refusing
def restore(
    source: Path,
    out: Path,
    task: str,
    bundle: str,
    strength: float,
    threads: int | None,
    device: str,
) -> None:
    """Restore a volume in physical units: HU, SUV or MR arbitrary units.

    IN is a .npy of shape (slices, rows, columns) or a NIfTI file; OUT is the same kind.

    \b
    diffcode restore low-dose.npy restored.npy --task ct_denoise
    """
    from restoration.restorer import Restorer
    from training import volumes

    volume = volumes.read(source, out)
    restorer = Restorer.open(bundle, device=device, threads=threads)
    with _progress("restoring") as progress:
        result = restorer.restore(
            volume.array,
            task,
            spacing=volume.spacing_mm,
            strength=strength,
            progress=lambda done, total: progress(done, total, source.name),
        )
    volumes.write(out, volume, result.volume)
    for flag in result.flags:
        click.echo(f"diffcode: warning: {flag}", err=True)
    click.echo(f"{out}: {len(result.volume)} slices in {result.seconds:.1f} s", err=True)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total, name: bars.update(
            bar, completed=done, total=total, description=f"{title} {name}"
        )


def _show(values: Any, table: Any, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        click.echo(json.dumps(values, indent=1))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
