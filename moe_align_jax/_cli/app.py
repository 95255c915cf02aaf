"""The typer application: options and help of each command."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape

import moe_align_jax
from moe_align_jax._cli import checkout, demo, eplb, info, profile, profile_layer
from moe_align_jax._core import checks
from moe_align_jax._core.int32 import INT32_MAX
from moe_align_jax._eplb.placement_files import Format
from moe_align_jax._lowering.select import IMPLEMENTATIONS
from moe_align_jax.eplb import Algorithm
from moe_align_jax.types import Implementation

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The expert layer of Mixture-of-Experts models for JAX and PyTorch.",
)


def _console() -> Console:
    """As wide as the terminal; in a file, wide enough that no table cuts its columns."""
    usual = Console()
    return usual if usual.is_terminal or "COLUMNS" in os.environ else Console(width=160)


def _none_of(option: str, value: str, names: Iterable[str]) -> typer.BadParameter:
    """The error that names the option, as typer's own do."""
    return typer.BadParameter(f"{value!r} is none of {', '.join(names)}", param_hint=repr(option))


def _known(name: str | None) -> str | None:
    if name is not None and name not in IMPLEMENTATIONS:
        raise _none_of("--implementation", name, IMPLEMENTATIONS)
    return name


_Implementation = Annotated[
    str | None,
    typer.Option(
        callback=_known,
        help=f"One of {', '.join(IMPLEMENTATIONS)}; the best available by default.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        print(moe_align_jax.__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    del version


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)


def _guarded(console: Console, run) -> None:
    """Turns what this machine cannot do into one line; a bug keeps its traceback."""
    try:
        code = run()
    except NotImplementedError as error:
        console.print(f"[bold red]Cannot run here:[/] {escape(str(error))}", highlight=False)
        code = 1
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        # On stderr: it may be what this prints to that is full.
        Console(stderr=True).print(
            f"[bold red]Cannot write:[/] {escape(what)}", highlight=False, soft_wrap=True
        )
        code = 1
    except RuntimeError as error:
        if "nable to initialize backend" not in str(error):
            raise
        console.print(f"[bold red]jax finds no device:[/] {error}", highlight=False)
        code = 1
    _exit(code)


@app.command("demo")
def demo_command(
    implementation: _Implementation = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
) -> None:
    """Align random routings of real sizes on this machine and check the result against a plain NumPy loop."""
    console = _console()
    _guarded(console, lambda: demo.run(console, implementation=implementation, seed=seed))


@app.command("info")
def info_command() -> None:
    """Versions, devices, which implementations run here, and why not the rest."""
    console = _console()
    _guarded(console, lambda: info.run(console))


@app.command("profile")
def profile_command(
    num_tokens: Annotated[int, typer.Option(min=1, max=INT32_MAX)] = 4096,
    num_experts: Annotated[
        int | None, typer.Option(min=1, max=INT32_MAX, help="256 by default.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, max=INT32_MAX, help="8 by default.")] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, max=INT32_MAX, help="64 by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A whole expert layer, forward and backward, in place of the alignment: one of "
            f"{', '.join(profile_layer.MODELS)}."
        ),
    ] = None,
    scale: Annotated[
        int,
        typer.Option(
            min=1, max=INT32_MAX, help="With --model: its hidden size and width divided by this."
        ),
    ] = 1,
    repeats: Annotated[int, typer.Option(min=1, max=INT32_MAX, help="Calls in the trace.")] = 20,
    implementation: _Implementation = None,
    out: Annotated[Path, typer.Option(help="Folder for the trace.")] = Path("profile"),
) -> None:
    """Run the op, or a model's layer, under jax.profiler, print time per kernel, and leave the trace."""
    console = _console()
    if model is not None:
        if model not in profile_layer.MODELS:
            raise _none_of("--model", model, profile_layer.MODELS)
        if any(size is not None for size in (num_experts, top_k, block_size)):
            raise typer.BadParameter(
                "--num-experts, --top-k and --block-size are the model's: leave them out with --model"
            )
        _guarded(
            console,
            lambda: profile_layer.run(
                console,
                model=model,
                scale=scale,
                num_tokens=num_tokens,
                repeats=repeats,
                implementation=cast(Implementation | None, implementation),
                folder=out,
            ),
        )
        return
    if scale != 1:
        raise typer.BadParameter("--scale is of a layer: name it with --model")
    num_experts, top_k, block_size = num_experts or 256, top_k or 8, block_size or 64
    if top_k > num_experts:
        raise typer.BadParameter(f"--top-k {top_k} is more than --num-experts {num_experts}")
    padded = checks.capacity(
        num_tokens * top_k, block_size=block_size, num_experts=num_experts, pad_sorted_ids=False
    )
    if padded > INT32_MAX:
        raise typer.BadParameter(
            f"--num-tokens, --top-k, --num-experts and --block-size give {padded} padded rows; "
            "at most 2**31 - 1 are possible"
        )
    _guarded(
        console,
        lambda: profile.run(
            console,
            num_tokens=num_tokens,
            num_experts=num_experts,
            top_k=top_k,
            block_size=block_size,
            repeats=repeats,
            implementation=implementation,
            folder=out,
        ),
    )


@app.command("eplb")
def eplb_command(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Recorded loads: .npz, .json, .pt (SGLang's too), .arrow, .parquet. Several, one of "
            "each process of the same recording, are added up.",
        ),
    ],
    num_gpus: Annotated[int, typer.Option(min=1, help="GPUs that share the experts.")],
    num_redundant: Annotated[int, typer.Option(min=0, help="Slots beyond one per expert.")] = 0,
    num_nodes: Annotated[int, typer.Option(min=1, help="Nodes of fast interconnect.")] = 1,
    num_groups: Annotated[int, typer.Option(min=1, help="Expert groups of the model.")] = 1,
    algorithm: Annotated[
        str, typer.Option(help=f"One of {', '.join(get_args(Algorithm))}.")
    ] = "auto",
    spread_replicas: Annotated[
        bool, typer.Option("--spread-replicas", help="No two replicas of an expert on one GPU.")
    ] = False,
    previous: Annotated[
        Path | None,
        typer.Option(
            help="The placement in force, in any of the formats, where FILE does not hold it: few "
            "experts move. -1 stands for a slot that holds nothing."
        ),
    ] = None,
    previous_num_gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the placement in force; else --num-gpus.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The placement; placement.json, or .yaml for tensorrt-llm."),
    ] = None,
    format: Annotated[str, typer.Option(help=f"One of {', '.join(get_args(Format))}.")] = "sglang",
    first_layer: Annotated[
        int,
        typer.Option(min=0, help="Number of the first layer, where the format has layer numbers."),
    ] = 0,
    report: Annotated[
        Path | None, typer.Option(help="Sizes and balancedness of each layer, as JSON.")
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(help="Layers x GPUs, a PNG; named after the placement without it."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over files that are there.")
    ] = False,
) -> None:
    """Place experts by recorded loads: which to replicate, and on which GPU; expected balancedness."""
    if algorithm not in get_args(Algorithm):
        raise _none_of("--algorithm", algorithm, get_args(Algorithm))
    if format not in get_args(Format):
        raise _none_of("--format", format, get_args(Format))
    options = eplb.Options(
        num_gpus=num_gpus,
        num_redundant=num_redundant,
        num_nodes=num_nodes,
        num_groups=num_groups,
        algorithm=algorithm,
        spread_replicas=spread_replicas,
        previous=previous,
        previous_num_gpus=previous_num_gpus,
        out=out,
        format=cast(Format, format),
        first_layer=first_layer,
        report=report,
        heatmap=heatmap,
        overwrite=overwrite,
    )
    console = _console()
    _guarded(console, lambda: eplb.run(console, files, options))


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench_command(context: typer.Context) -> None:
    """Verify and time against vLLM's and SGLang's ops, torch and XLA (needs a checkout)."""
    root = checkout.find()
    if root is None:
        _console().print(checkout.MISSING, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    _exit(checkout.run(root, "benchmarks.run", context.args))
