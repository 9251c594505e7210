"""The command line: python -m lib train | certify | report | info (certify also under torchrun)."""

import functools
import json
import logging
import pathlib
import sys
import time
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
from lib import losses, models, zoo
from lib.certify import certify as certify_standard
from lib.checks import check_draws, check_level, difference
from lib.engine.hardware import pick_device
from lib.engine.jobs import Job, rank, run
from lib.iss import DRAWS, KINDS, certify_iss, sample_size_map
from lib.models import load_checkpoint, model_hash, save_checkpoint
from lib.noise import Gaussian
from lib.report import as_text, draw_curves, formatted, summarize
from lib.store.files import read_bytes
from lib.store.records import load_counts
from lib.train import fit

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Randomized smoothing: train a network under noise, certify it, report what was certified.",
    epilog="Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 130 interrupted.",
)  # fmt: skip


def _standard(noise, n0, n, alpha):
    return lambda counts: certify_standard(counts, noise, n0, n, alpha)


def _iss(noise, n0, n, alpha, decline, kind, draws):
    sizes = sample_size_map(n, decline, kind, noise, alpha)
    return lambda counts: certify_iss(counts, noise, n0, n, sizes, alpha, draws)


# Sampler: (its maker, the options that it takes with their defaults).
SAMPLERS = {
    "certify": (_standard, {}),
    "iss": (_iss, {"decline": 0.05, "kind": "absolute", "draws": "fresh"}),
}
LOSSES = {"gaussian": losses.GaussianLoss}

Data = Literal[*datasets.INFO]
Architecture = Literal[*models.ARCHITECTURES]
Dtype = Literal["auto", "float32", "bfloat16"]

_options = {"debug": False}  # of the whole program

DataPath = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--data-path", help="Read the data set from this file or folder (see lib.data.load)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, for scripts.")]


def _version(wanted: bool):
    if wanted:
        print(
            f"randomized-smoothing {lib.__version__}, torch {torch.__version__}, numpy {np.__version__}"
        )
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error (before the command: --debug certify ...).",
        ),
    ] = False,
):
    _options["debug"] = debug
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lib").setLevel(logging.INFO)


def command(function):
    """A subcommand whose errors are one line and exit code 1."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            if _options["debug"]:
                raise
            me, processes = rank()
            # lib's own errors are ValueError and OSError; torch's (out of memory, ...) go on for many lines.
            text = (
                f"{str(error).splitlines()[0]} (--debug shows where)"
                if isinstance(error, RuntimeError) and str(error)
                else error
            )
            print(f"error{f' (rank {me})' if processes > 1 else ''}: {text}", file=sys.stderr)
            raise SystemExit(1) from error
        except KeyboardInterrupt:
            print("\ninterrupted: the same command continues where it stopped", file=sys.stderr)
            raise SystemExit(130) from None

    return app.command()(guarded)


def _load_model(spec, architecture=None, data=None):
    """(module, header) of a checkpoint file or of a model of the zoo."""
    if pathlib.Path(spec).is_file():
        return load_checkpoint(spec, architecture, data)
    if spec in zoo.MODELS:
        return zoo.model(spec), {
            "architecture": zoo.MODELS[spec].architecture,
            "data": zoo.MODELS[spec].data,
        }
    raise FileNotFoundError(
        f"model {spec} is neither a file nor a name of the zoo ({', '.join(zoo.MODELS)})"
    )


def _indices(size, start, stop, skip, most):
    """The examples that the field's scripts would certify: every skip-th index of the data set from start to before stop and max."""
    if start < 0 or skip < 1:
        raise ValueError(f"start must be >= 0 and skip >= 1; got start = {start}, skip = {skip}")
    ends = [size, *(end for end in (stop, most) if end is not None and end >= 0)]
    index = np.arange(min(ends))
    index = index[(index >= start) & (index % skip == 0)]
    if not len(index):
        raise ValueError(
            f"start = {start}, stop = {stop}, skip = {skip}, max = {most} leave none of the {size} examples"
        )
    return index


@command
def certify(
    model: Annotated[
        str, typer.Argument(help="A checkpoint (ours or a published one), or a name of the zoo.")
    ],
    sigma: Annotated[float, typer.Option(help="Noise level, in units of pixels in [0, 1].")],
    out: Annotated[
        pathlib.Path, typer.Option(help="Log to write; the record goes beside it as OUT.npz.")
    ],
    data: Annotated[Data | None, typer.Option(help="Data set; default the model's.")] = None,
    data_path: DataPath = None,
    split: Literal["train", "test"] = "test",
    architecture: Annotated[
        Architecture | None, typer.Option(help="Where the checkpoint does not say it.")
    ] = None,
    start: Annotated[int, typer.Option(help="First index in the data set.")] = 0,
    stop: Annotated[int | None, typer.Option(help="End of the indices (not included).")] = None,
    skip: Annotated[
        int, typer.Option(help="Only indices that this divides: 20 takes 0, 20, 40, ...")
    ] = 1,
    max: Annotated[
        int | None, typer.Option(help="Stop at this index (as stop; -1: never).")
    ] = None,
    n0: Annotated[int, typer.Option("--n0", "--N0", help="Draws that choose the class.")] = 100,
    n: Annotated[
        int,
        typer.Option(
            "--n", "--N", help="Draws for the bound (the most, where the sampler decides)."
        ),
    ] = 100_000,
    alpha: Annotated[
        float, typer.Option(help="Failure probability per example, one-sided.")
    ] = 0.001,
    sampler: Literal[*SAMPLERS] = "certify",
    decline: Annotated[
        float | None,
        typer.Option(help="iss: radius that may be lost, or its share. [dim]default 0.05[/]"),
    ] = None,
    kind: Annotated[
        Literal[*KINDS] | None, typer.Option(help="iss: what decline is. [dim]default absolute[/]")
    ] = None,
    draws: Annotated[
        Literal[*DRAWS] | None,
        typer.Option(help="iss: of the bound; reused as published. [dim]default fresh[/]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; default a GPU where there is one.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision of the network that is certified.")
    ] = "auto",
    block: Annotated[
        int | None, typer.Option(help="Images a forward pass. [dim]default: measured[/]")
    ] = None,
    layout: Annotated[
        Literal["channels_last", "contiguous"] | None,
        typer.Option(help="Memory layout. [dim]default: measured[/]"),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Default: where the job is long enough to pay for it."
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="Measure what is fastest here (once, then cached)."
        ),
    ] = True,
    as_json: AsJson = False,
):
    """Certify a network: the field's log, at full precision, and a record of all votes.

    Interrupted or killed, the same command continues where it stopped. Several processes: torchrun --nproc-per-node 2 -m lib certify ...
    """
    check_draws(n0=n0, n=n)
    check_level(alpha=alpha)
    noise = Gaussian(sigma)
    network, header = _load_model(model, architecture, data)
    name = data or header["data"]
    images, labels = datasets.load(name, split, path=data_path)
    index = _indices(len(images), start, stop, skip, max)
    maker, defaults = SAMPLERS[sampler]
    given = {
        k: v for k, v in (("decline", decline), ("kind", kind), ("draws", draws)) if v is not None
    }
    if not set(given) <= set(defaults):
        raise typer.BadParameter(
            f"sampler {sampler} takes no {', '.join(sorted(set(given) - set(defaults)))}"
        )
    options = defaults | given
    settings = {
        "data": name, "split": split, "start": start, "skip": skip, "stop": int(index[-1]) + 1, "sigma": sigma, "n0": n0, "n": n,
        "alpha": alpha, "sampler": sampler, **options,
    }  # fmt: skip
    engine = {
        "device": device and pick_device(device), "dtype": None if dtype == "auto" else getattr(torch, dtype), "block": block,
        "layout": layout, "compile": "auto" if compile is None else compile, "tune": calibrate,
    }  # fmt: skip
    job = Job(
        network,
        model,
        images,
        labels.numpy(),
        index,
        maker(noise, n0, n, alpha, **options),
        noise,
        seed,
        n0 + n,
        out,
        settings,
        engine,
    )
    begin = time.perf_counter()
    done = run(job)
    if rank()[0] == 0:
        _say(
            f"{done} examples certified in {time.perf_counter() - begin:.1f} s, {len(index) - done} were done before: {out}, record {out}.npz"
        )
        _print_report(summarize([out]), as_json)


@command
def train(
    out: Annotated[
        pathlib.Path, typer.Option(help="Checkpoint to write (safetensors), after each epoch.")
    ],
    sigma: Annotated[
        float, typer.Option(help="Noise level to train for, in units of pixels in [0, 1].")
    ],
    data: Data = "digits",
    data_path: DataPath = None,
    architecture: Architecture = "small_cnn",
    loss: Literal[*LOSSES] = "gaussian",
    epochs: int = 60,
    lr: Annotated[float, typer.Option(help="Peak of the one-cycle schedule.")] = 0.1,
    batch: int = 64,
    weight_decay: float = 5e-4,
    seed: int = 0,
    augment: Annotated[
        bool | None,
        typer.Option(
            "--augment/--no-augment", help="Random crops and flips; default: for cifar10."
        ),
    ] = None,
    average: Annotated[
        float | None,
        typer.Option(help="Decay of an average of the weights, which then is the result."),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="bfloat16 trains under autocast; auto is float32.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Default a GPU where there is one.")] = None,
    as_json: AsJson = False,
):
    """Train a network under noise. Interrupted or killed, the same command continues after the last whole epoch, to the same weights."""
    if data == "imagenet":
        raise ValueError(
            "data must be a data set that fits into memory (imagenet does not): train with the field's scripts, certify the result here"
        )
    augment = data == "cifar10" if augment is None else augment
    noise = Gaussian(sigma)
    x, y = datasets.load(data, "train", path=data_path)
    held_x, held_y = (part[:1000] for part in datasets.load(data, "test", path=data_path))
    settings = {
        "architecture": architecture, "data": data, "data_sha256": datasets.content_hash(x), "loss": loss, "sigma": sigma,
        "epochs": epochs, "lr": lr, "batch": batch, "weight_decay": weight_decay, "seed": seed, "augment": augment, "average": average,
        "dtype": dtype,
    }  # fmt: skip
    state = out.with_name(out.name + ".state")
    header = load_checkpoint(out)[1] if out.exists() else None
    if header and {name: header.get(name) for name in settings} != settings:
        changed = difference(header, header | settings)
        raise ValueError(
            f"{out} was trained with {changed}: give another --out, take the old setting, or delete it (and its .state)"
        )
    if not header or header.get("epoch") != epochs:
        torch.manual_seed(seed)
        network = models.build(settings["architecture"], settings["data"])
        begin, first = time.perf_counter(), []

        def after_epoch(trained, history):
            first.append(len(history))
            accuracy = _noisy_accuracy(trained, held_x, held_y, noise, seed)
            header = settings | {
                "epoch": len(history),
                "test_noisy_accuracy": accuracy,
                "torch": torch.__version__,
            }
            save_checkpoint(out, trained, header, half=False)
            rate = (len(history) - first[0] + 1) / (time.perf_counter() - begin)
            _say(
                f"epoch {len(history)}/{epochs}  loss {history[-1]['loss']:.4f}  noisy accuracy {accuracy:.3f} (test images, only watched)  "
                f"{rate * len(x):,.0f} images/s  {(epochs - len(history)) / rate:.0f} s left"
            )

        history = fit(
            network, x, y, LOSSES[loss](), noise, epochs, lr, batch, weight_decay=weight_decay, seed=seed, augment=augment, average=average,
            state=state, dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32, device=pick_device(device), after_epoch=after_epoch,
        )  # fmt: skip
        if not first:  # killed after its last epoch, before that one's checkpoint
            after_epoch(network, history)
        header = load_checkpoint(out)[1]
    state.unlink(missing_ok=True)
    print(
        json.dumps(header)
        if as_json
        else f"{out}: noisy accuracy {header['test_noisy_accuracy']:.3f} after {header['epoch']} epochs"
    )


@torch.no_grad()
def _noisy_accuracy(network, x, y, noise, seed):
    """Share of images whose one noisy copy is classified right."""
    network.eval()
    noisy = noise.sample(x, torch.Generator().manual_seed(seed)).to(
        next(network.parameters()).device
    )
    votes = torch.cat([network(part).argmax(dim=1).cpu() for part in noisy.split(250)])
    return float((votes == y).float().mean())


@command
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
        typer.Option(help="Also draw certified accuracy over the radius into this file."),
    ] = None,
):
    """Report what logs certify: ACR, certified accuracy at radii, abstentions, draws, time."""
    if csv + latex + markdown + as_json > 1:
        raise typer.BadParameter("take one of --csv, --latex, --markdown, --json")
    try:
        table = summarize(logs, None if radii is None else [float(r) for r in radii.split(",")])
    except ValueError as error:
        if "could not convert" in str(error):
            raise typer.BadParameter(
                f"--radii takes numbers between commas; got {radii}"
            ) from error
        raise
    if png:
        draw_curves(logs, png)
        _say(f"curves: {png}")
    _print_report(
        table, as_json, "csv" if csv else "latex" if latex else "markdown" if markdown else None
    )


def _rows(table):
    """The rows of a table as dicts for JSON, None where a log does not say."""
    return table.astype(object).where(table.notna(), None).reset_index().to_dict("records")


def _print_report(table, as_json, style=None):
    if as_json:
        print(json.dumps(_rows(table)))
    elif style:
        print(as_text(table, style), end="")
    else:
        cells = formatted(table)
        shown = Table(
            "log",
            *(header for header in cells),
            caption="certified accuracy under each radius; ACR: mean radius, 0 where wrong",
        )
        for column in shown.columns[1:]:
            column.justify = "right"
        for name, row in zip(cells.index, cells.to_numpy(), strict=True):
            shown.add_row(escape(name), *row)
        # Into a file or a pipe the table is as wide as it is.
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(shown)


@command
def info(
    path: Annotated[pathlib.Path, typer.Argument(help="A checkpoint, a record (.npz) or a log.")],
    architecture: Annotated[
        Architecture | None, typer.Option(help="Where the checkpoint does not say it.")
    ] = None,
    data: Annotated[Data | None, typer.Option(help="Where the checkpoint does not say it.")] = None,
    as_json: AsJson = False,
):
    """Say what a checkpoint, a record or a log holds."""
    start = read_bytes(path, "give the path of a checkpoint, a record or a log")[:4]
    if start == b"idx\t":
        found = {"kind": "log"} | _rows(summarize([path]))[0]
    elif path.suffix == ".npz":
        record = load_counts(path)
        header = {
            "decline kind" if name == "kind" else name: value
            for name, value in record.header.items()
        }
        found = {
            "kind": "record",
            "examples": len(record.index),
            "classes": record.counts.shape[1],
        } | header
        found |= {"votes": int(record.counts.sum())}
    else:
        network, header = load_checkpoint(path, architecture, data)
        found = (
            {"kind": "checkpoint"}
            | header
            | {
                "parameters": sum(p.numel() for p in network.parameters()),
                "model_sha256": model_hash(network),
            }
        )
    if as_json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:16} {value}")


def _say(text):
    # Above a progress bar, not into it.
    tqdm.write(text, file=sys.stderr)


if __name__ == "__main__":
    app()
