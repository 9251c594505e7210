"""The command line: python -m lib COMMAND.

COMMAND: train | quantize | sigma | certify | replay | audit | report | info.

certify also runs under torchrun.
"""

import functools
import json
import logging
import pathlib
import sys
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

import lib
from lib import data as datasets
from lib import models
from lib.audit import audit as audited
from lib.audit import verdict, worst
from lib.counts import RecordedCounts
from lib.engine.hardware import pick_device
from lib.engine.jobs import Job, rank, run
from lib.engine.readouts import ensemble_readout
from lib.ensemble import VOTES, Ensemble
from lib.losses import LOSSES
from lib.metrics import formatted, latex, summarize
from lib.noise import NOISES
from lib.options import (
    Engine,
    Examples,
    check_report,
    check_sigma_file,
    check_suffix,
    data_file,
    data_set,
    load_ensemble,
    load_levels,
    load_model,
    say_other_noise,
    short_names,
    take,
    usage_error,
    with_options,
)
from lib.recipes import Recipe, quantize_network
from lib.recipes import train as train_network
from lib.samplers import SAMPLERS
from lib.sigma import Ascent, search
from lib.store.inventory import facts_of, in_words, json_rows
from lib.store.logs import read_log, write_log
from lib.store.records import load_counts
from lib.train import Schedule

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Randomized smoothing: train a network under noise, certify it, report what it certifies.",
    epilog="Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 130 interrupted.",
)
Architecture = Literal[*models.ARCHITECTURES]
_options = {"debug": False}  # of the whole program

_named = {"parser": data_set, "metavar": f"<{'|'.join(datasets.INFO)}|FILE.npz>"}
DataSet = Annotated[
    str | None,
    typer.Option(help="Data set, or a file of your own images; default the model's.", **_named),
]
DataPath = Annotated[
    pathlib.Path | None,
    typer.Option("--data-path", help="Read the data set from this file or folder (lib.data.load)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _version(wanted: bool):
    if wanted:
        versions = f"torch {torch.__version__}, numpy {np.__version__}"
        print(f"randomized-smoothing {lib.__version__}, {versions}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback (before the command).")
    ] = False,
):
    _options["debug"] = debug
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lib").setLevel(logging.INFO)


def command(*groups, resumes=False):
    """A subcommand with the options of these groups, whose errors are one line and exit code 1.

    - resumes: whether the same command continues what was interrupted, or begins anew.
    """

    def decorate(function):
        offered = with_options(function, groups)

        @functools.wraps(offered)
        def guarded(*args, **kwargs):
            try:
                result = offered(*args, **kwargs)
                sys.stdout.flush()
                return result
            except BrokenPipeError:  # the reader, such as head, has enough: typer ends quietly
                raise
            except (ValueError, OSError, RuntimeError) as error:
                if _options["debug"]:
                    raise
                if wrong := usage_error(error, offered, kwargs):
                    raise wrong from error
                _print_error(error)
                raise SystemExit(1) from error
            except KeyboardInterrupt:
                then = "continues where it stopped" if resumes else "begins anew"
                print(f"\ninterrupted: the same command {then}", file=sys.stderr)
                raise SystemExit(130) from None

        return app.command()(guarded)

    return decorate


def _print_error(error):
    me, processes = rank()
    where = f" (rank {me})" if processes > 1 else ""
    text = error
    # lib's own errors are ValueError and OSError; torch's (out of memory, ...) take many lines.
    if isinstance(error, RuntimeError) and str(error):
        text = f"{str(error).splitlines()[0]} (--debug shows where)"
    print(f"error{where}: {text}", file=sys.stderr)


@command(NOISES, SAMPLERS, Examples, Engine, resumes=True)
def certify(
    model: Annotated[
        list[str],
        typer.Argument(help="Checkpoint (ours or published) or zoo name; several: an ensemble."),
    ],
    out: Annotated[pathlib.Path, typer.Option(help="Log to write; the record is OUT.npz.")],
    vote: Annotated[
        Literal[*VOTES] | None, typer.Option(help="How an ensemble votes. [dim]default soft[/]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of --vote weighted: numbers >= 0 between commas.")
    ] = None,
    consensus: Annotated[
        int | None, typer.Option(help="K: the first K networks decide where they agree.")
    ] = None,
    data: DataSet = None,
    data_path: DataPath = None,
    architecture: Annotated[
        Architecture | None, typer.Option(help="Where the checkpoint does not say it.")
    ] = None,
    noise: Annotated[
        Literal[*NOISES] | None,
        typer.Option(help="Smoothing distribution. [dim]default Gaussian[/]"),
    ] = None,
    sampler: Literal[*SAMPLERS] = "certify",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    sigma_file: Annotated[
        pathlib.Path | None,
        typer.Option(help="A level for each image: a file of `sigma`, in place of --sigma."),
    ] = None,
    sigma_steps: Annotated[
        int | None, typer.Option(help="Levels after so many steps; default the last of the file.")
    ] = None,
    as_json: AsJson = False,
    **options,
):
    """Certify a network: a log at full precision, and a record of all votes.

    Interrupted or killed, the same command continues where it stopped. A finished run continues
    with more examples (--max, --stop; not with --sigma-file) or, where the draws are fixed, with
    more draws (--n). Whether to take more draws must not be decided by what was certified, else
    alpha does not hold.
    Several processes: torchrun --nproc-per-node 2 -m -- lib certify ...
    """
    check_sigma_file(sigma_file, sigma_steps, noise, options)
    chosen = [(SAMPLERS, sampler), (Examples, None), (Engine, None)]
    chosen += [(NOISES, noise or "Gaussian")] if sigma_file is None else []
    job_sampler, examples, engine, *smoothing = (take(options, *each) for each in chosen)
    network, header = load_ensemble(model, vote, weights, consensus, architecture, data)
    images, labels = datasets.load(header["data"], examples.split, path=data_file(data, data_path))
    index = examples.index(len(images))
    if smoothing:
        (smoothing,) = smoothing
    else:
        smoothing = load_levels(sigma_file, sigma_steps, network, images, index)
    settings = {
        "data": header["data"],
        "split": examples.split,
        "start": examples.start,
        "skip": examples.skip,
    }
    if sigma_file is None and rank()[0] == 0:
        say_other_noise(header, smoothing, _say)
    job = Job(
        network,
        " ".join(model),
        images,
        labels.numpy(),
        index,
        job_sampler,
        smoothing,
        seed,
        out,
        settings,
        engine.settings(),
        ensemble_readout(network).name if isinstance(network, Ensemble) else None,
    )
    files = f"{out}, record {out}.npz" if job.certifies else f"record {out}.npz"
    run(job, lambda text: _say(f"{text}: {files}"))
    if rank()[0] == 0:
        if standard := getattr(job_sampler, "standard", None):
            mean = float(read_log(out)["n"].mean())
            _say(
                f"SampleRF {standard / mean:.2f}: {mean:,.0f} draws per example, where CERTIFY of "
                f"the same reach takes {standard:,}"
            )
        if job.certifies:
            _print_report(summarize({str(out): read_log(out)}), as_json)


@command(SAMPLERS)
def replay(
    record: Annotated[pathlib.Path, typer.Argument(help="A record of votes (.npz).")],
    out: Annotated[pathlib.Path, typer.Option(help="Log to write.")],
    sampler: Literal[*SAMPLERS] = "certify",
    readout: Annotated[
        str | None, typer.Option(help="Which, of a record that holds several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which votes are replayed.")] = 0,
    as_json: AsJson = False,
    **options,
):
    """Certify from a record's votes under any sampler: a log, without running the network.

    The record is OUT.npz of a run whose draws were fixed beforehand (the samplers record, certify,
    margin, partition); the noise is the record's. The log's time is 0, and its bytes are the same
    each time. It is never written over a file of other content.
    Which sampler, n or alpha must not be decided by what other replays certified, else alpha does
    not hold.
    """
    chosen = take(options, SAMPLERS, sampler)
    if not chosen.certifies:
        raise typer.BadParameter(f"sampler {sampler} makes no certificates")
    journal = out.with_name(f"{out.name}.journal")
    if journal.exists():
        raise ValueError(f"{out} is the log of a run ({journal.name}): give another --out")
    votes = load_counts(record)
    if readout is not None and not votes.readouts:
        raise typer.BadParameter(f"--readout is of records of several: {record} holds one")
    if votes.readouts and readout is None:
        names = ", ".join(votes.readouts)
        raise typer.BadParameter(f"{record} holds several readouts: give --readout, one of {names}")
    votes = votes if readout is None else votes.readout(readout)
    counts = RecordedCounts(votes, seed)
    table = chosen(counts, counts.noise).frame(votes.labels).assign(idx=votes.index, time=0.0)
    write_log(out, table.rename(columns={"prediction": "predict"}), replace=False)
    _say(f"{len(table)} examples replayed from {record}: {out}")
    _print_report(summarize({str(out): read_log(out)}), as_json)


@command(NOISES, SAMPLERS)
def audit(
    noise: Annotated[Literal[*NOISES], typer.Option(help="Smoothing distribution.")] = "Gaussian",
    sampler: Literal[*SAMPLERS] = "certify",
    runs: Annotated[int, typer.Option(help="Simulated examples of each truth.")] = 100_000,
    seed: Annotated[int, typer.Option(help="Of the simulation.")] = 0,
    as_json: AsJson = False,
    **options,
):
    """Audit a sampler: how often it is wrong at known class probabilities, against its alpha.

    Exit code 1 where it fails. A sampler of your own: lib.audit.audit(sampler, noise).
    """
    chosen, smoothing = take(options, SAMPLERS, sampler), take(options, NOISES, noise)
    if not chosen.certifies:
        raise typer.BadParameter(f"sampler {sampler} makes no certificates")
    table = audited(chosen, smoothing, runs=runs, seed=seed)
    found, most = verdict(table), worst(table)
    if as_json:
        rows = table.astype(object).where(table.notna(), None).to_dict("records")
        print(json.dumps({"verdict": found, "worst": most["rate"], "rows": rows}))
    else:
        print(table.round(4).to_string(index=False, na_rep="-"))
        print(f"{sampler} {found}: at worst {most['rate']:.3f} alpha, at p = {most['p']:.6g}")
    if found == "fails":
        raise SystemExit(1)


@command(Ascent, Examples, Engine)
def sigma(
    model: Annotated[str, typer.Argument(help="A checkpoint (ours or published), or a zoo name.")],
    out: Annotated[pathlib.Path, typer.Option(help="File of levels to write (.npz).")],
    sigma0: Annotated[float, typer.Option(help="Level that the search starts from.")],
    data: DataSet = None,
    data_path: DataPath = None,
    architecture: Annotated[
        Architecture | None, typer.Option(help="Where the checkpoint does not say it.")
    ] = None,
    noise: Annotated[Literal[*NOISES], typer.Option(help="Smoothing distribution.")] = "Gaussian",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    **options,
):
    """Find a noise level for each image (Alfarra et al. 2022, algorithm 1).

    `certify --sigma-file` then certifies each image at its level, with fresh noise. The file is
    written at the end: interrupted, the same command begins anew. A finished file is left as it is.
    """
    ascent, examples, engine = (take(options, group) for group in (Ascent, Examples, Engine))
    network, header = load_model(model, architecture, data)
    images, _ = datasets.load(header["data"], examples.split, path=data_file(data, data_path))
    index = examples.index(len(images))
    settings = {"data": header["data"], "split": examples.split}
    found = search(
        network, model, images, index, sigma0, ascent, NOISES[noise], seed, settings,
        engine.settings(), out,
    )  # fmt: skip
    last = found.levels[-1]
    _say(
        f"{out}: {len(index)} levels after {ascent.steps} steps from {sigma0}, "
        f"mean {last.mean():.4f}, from {last.min():.4f} to {last.max():.4f}"
    )


@command(NOISES, LOSSES, Schedule, resumes=True)
def train(
    out: Annotated[
        pathlib.Path,
        typer.Option(
            help="Checkpoint to write after each epoch: NAME.safetensors. OUT.csv gets a line per "
            "epoch; OUT.state, until the end, what resuming needs."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Data set, or a file of your own images.", **_named)
    ] = "digits",
    data_path: DataPath = None,
    architecture: Architecture = "small_cnn",
    noise: Annotated[Literal[*NOISES], typer.Option(help="Smoothing distribution.")] = "Gaussian",
    loss: Literal[*LOSSES] = "gaussian",
    device: Annotated[str | None, typer.Option(help="Default a GPU where there is one.")] = None,
    as_json: AsJson = False,
    **options,
):
    """Train a network under noise.

    Interrupted or killed, the same command continues after the last whole epoch, to the same
    weights.
    """
    if not out.exists():  # one of another name may have been begun by an older version
        check_suffix(out, ".safetensors")
    if data == "imagenet":
        raise ValueError(
            "data must be a data set that fits into memory (imagenet does not): train with the "
            "published scripts, certify the result here"
        )
    options.setdefault("augment", data == "cifar10")
    chosen = [(NOISES, noise), (LOSSES, loss), (Schedule, None)]
    smoothing, trained_with, schedule = (take(options, *each) for each in chosen)
    described = NOISES.describe(smoothing), LOSSES.describe(trained_with)
    name, data_path = datasets.name_of(data), data_file(data, data_path)
    recipe = Recipe(architecture, name, *described, schedule)
    header = train_network(recipe, out, data_path, pick_device(device), half=False, say=_say)
    print(
        json.dumps(header)
        if as_json
        else f"{out}: noisy accuracy {header['noisy_accuracy']:.3f} after {header['epoch']} epochs"
    )


@command(NOISES)
def quantize(
    model: Annotated[str, typer.Argument(help="A checkpoint (ours or published), or a zoo name.")],
    out: Annotated[pathlib.Path, typer.Option(help="Checkpoint to write: NAME.int8.safetensors.")],
    data: DataSet = None,
    data_path: DataPath = None,
    architecture: Annotated[
        Architecture | None, typer.Option(help="Where the checkpoint does not say it.")
    ] = None,
    noise: Annotated[Literal[*NOISES], typer.Option(help="Smoothing distribution.")] = "Gaussian",
    images: Annotated[int, typer.Option(help="Training images that the scales are found on.")] = (
        1024
    ),
    seed: Annotated[int, typer.Option(help="Of the noise on them.")] = 0,
    as_json: AsJson = False,
    **options,
):
    """Make the 8-bit version of a network, once.

    The result is a network of its own, with its own hash: certify takes it as any other, on CPUs
    with 8-bit dot products, and its certificates are about it alone.
    """
    if out.exists():
        raise ValueError(f"{out} exists: a network is quantised once; give another --out")
    check_suffix(out, ".safetensors")
    network, header = load_model(model, architecture, data)
    header |= {"name": pathlib.Path(model).name.removesuffix(".safetensors")}
    smoothing = take(options, NOISES, noise)
    data_path = data_file(data, data_path)
    made = quantize_network(out, network, header, smoothing, data_path, images, seed)
    print(
        json.dumps(made)
        if as_json
        else f"{out}: noisy accuracy {made['noisy_accuracy']:.3f} in 8 bits"
    )


@command()
def report(
    logs: Annotated[list[pathlib.Path], typer.Argument(help="Logs, ours or published.")],
    radii: Annotated[
        str | None, typer.Option(help="Comma-separated, such as 0,0.25,0.5; default steps of 0.25.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV, at full precision.")] = False,
    latex: Annotated[
        bool, typer.Option("--latex", help="Print LaTeX (booktabs), the best in bold.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: AsJson = False,
    png: Annotated[
        pathlib.Path | None,
        typer.Option(help="Also draw certified accuracy over the radius into this file (.png)."),
    ] = None,
):
    """Report what logs certify: ACR, certified accuracy at radii, abstentions, draws, time.

    Of several logs also the gain in ACR over the first one, on the examples that both hold, with
    its standard error over these examples.
    """
    if csv + latex + markdown + as_json > 1:
        raise typer.BadParameter("take one of --csv, --latex, --markdown, --json")
    check_report(logs, png)
    read = {str(path): read_log(path) for path in logs}
    try:
        table = summarize(read, None if radii is None else [float(r) for r in radii.split(",")])
    except ValueError as error:
        if "could not convert" in str(error):
            raise typer.BadParameter(
                f"--radii takes numbers between commas; got {radii}"
            ) from error
        raise
    if png:
        from lib.plots import draw_logs  # matplotlib takes a second to import

        draw_logs(read, png)
        _say(f"curves: {png}")
    _print_report(
        table, as_json, "csv" if csv else "latex" if latex else "markdown" if markdown else None
    )


@command()
def info(
    path: Annotated[
        pathlib.Path,
        typer.Argument(help="A checkpoint, a record, a file of levels or images (.npz), or a log."),
    ],
    architecture: Annotated[
        Architecture | None, typer.Option(help="Where the checkpoint does not say it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the checkpoint does not say it.", **_named)
    ] = None,
    as_json: AsJson = False,
):
    """Say what a checkpoint, a record, a file of levels or images or a log is, and how made."""
    facts = facts_of(path, architecture, datasets.name_of(data))
    if as_json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:16} {in_words(value) if isinstance(value, dict) else value}")


def _print_report(table, as_json, style=None):
    """Print a table of `summarize` as JSON, "csv", "latex", "markdown", or for a terminal."""
    if as_json:
        print(json.dumps(json_rows(table)))
    elif style == "csv":
        print(table.to_csv(lineterminator="\n"), end="")
    elif style == "latex":
        print(latex(table), end="")
    elif style == "markdown":
        from lib.plots import markdown

        print(markdown(formatted(table).reset_index()))
    else:
        cells = formatted(table)
        shown = Table(
            "log",
            *(header for header in cells),
            caption="certified accuracy under each radius; ACR: mean radius, 0 where wrong"
            + "; gain: in ACR, over the first log" * ("gain" in cells),
        )
        for column in shown.columns[1:]:
            column.justify = "right"
        shown.columns[0].overflow = "fold"
        for name, row in zip(short_names(cells.index), cells.to_numpy(), strict=True):
            shown.add_row(escape(name), *row)
        # Into a file or a pipe the table is as wide as it is.
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(shown)


def _say(text):
    """Print a message to stderr, above a progress bar and not into it."""
    tqdm.write(text, file=sys.stderr)


if __name__ == "__main__":
    app()
