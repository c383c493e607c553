"""The command line, thin: each command's work is in a module of its own, which the command imports.

Here are `main`, what becomes of errors, and the commands for people; `jobs` are Snakemake's, `models` are a group.

A mistake of the user (`ValueError`; a file or folder that is missing, closed, full) is one line on stderr and exit code
2. `--debug` shows where it came from, as jobs always do: their stderr is a log. Anything else keeps its traceback.
"""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from scspec.cli import jobs, models
from scspec.cli.plain import PLAIN

USER_ERROR = 2  # as click's own
#: What of the system's faults is the user's to mend, and how.
_REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP), "check the path"),
    errno.ENAMETOOLONG: "shorten the path",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose another path, or have this one opened to you"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose another disk"),
}

app = typer.Typer(**PLAIN, help="Speculative decoding with stochastic computing. Runs: snakemake --cores all")
app.add_typer(jobs.app)
app.add_typer(models.app, name="models")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit code of a command line (without the program's name; None for the process's own)."""
    state = {"traceback": False}
    try:
        command = typer.main.get_command(app)
        return command.main(argv, prog_name="scspec", standalone_mode=False, obj=state) or 0
    except typer.TyperException as error:  # an option or argument
        context = getattr(error, "ctx", None)
        shown = context.command_path if context else "scspec"
        return _refuse(f"{error.format_message().rstrip('.')}; see: {shown} --help")
    except typer.Abort:
        return _refuse("aborted")
    except (ValueError, OSError) as error:
        message = _message(error)
        if message is None:
            raise
        if state["traceback"]:
            traceback.print_exc()
        return _refuse(message)


def _refuse(message: str) -> int:
    print(f"scspec: error: {' '.join(message.split())}", file=sys.stderr)
    return USER_ERROR


def _message(error: ValueError | OSError) -> str | None:
    """Return what to tell the user, None for what is not the user's to mend."""
    if isinstance(error, ValueError) or (isinstance(error, FileNotFoundError) and error.errno is None):
        return str(error)
    if error.errno not in _REMEDIES:
        return None
    where = f"{os.fspath(error.filename)}: " if error.filename else ""
    return f"{where}{error.strerror}; {_REMEDIES[error.errno]}"


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"scspec {version('scspec')}")
        raise typer.Exit()


@app.callback()
def _global(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj["traceback"] = debug


@app.command()
def plan(
    configfile: Annotated[
        Path, typer.Option(help="The experiment; as with Snakemake, laid over a config.yaml that is here.")
    ] = Path("config.yaml"),
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="How likely a proposal is accepted, for the estimate.")
    ] = 0.7,
) -> None:
    """List the cells of an experiment and what cannot exist, and estimate tokens and device hours."""
    from scspec.config import read_layered
    from scspec.estimate import plan_lines

    for line in plan_lines(read_layered(configfile), alpha):
        print(line)


@app.command()
def report(
    plan: Annotated[Path, typer.Option(help="results/plan.json, written by Snakemake.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The HTML file to write.", show_default=False)],
) -> None:
    """Write the report of the cells of a plan that exist, and its table beside it."""
    from scspec.report import report_plan

    report_plan(plan, output)


Side = Annotated[Path, typer.Argument(help="A cell's Parquet file, or a folder of them.", show_default=False)]


@app.command()
def compare(a: Side, b: Side) -> None:
    """Print how two cells or two grids differ, b minus a."""
    from scspec.compare import compare, plain_tables, read_side

    print(plain_tables(compare(read_side(a), read_side(b))))


@app.command()
def doctor(
    results: Annotated[Path, typer.Option(help="The results folder.")] = Path("results"),
) -> None:
    """Check what scspec needs of this machine, a line per check; exit code 1 if something needed is broken."""
    from scspec.doctor import BROKEN, examine

    states = set()
    for finding in examine(results):
        print(finding, flush=True)
        states.add(finding.state)
    raise typer.Exit(1 if BROKEN in states else 0)


def _own_variable(name: str, help: str, **limits: Any) -> Any:
    """Return an option that the environment variable of its name sets too, in capitals."""
    return typer.Option(envvar=name, help=help, **limits)


@app.command()
def sweep(
    target_model: Annotated[
        str, _own_variable("TARGET_MODEL", "An alias, a folder, or a Hugging Face id.")
    ] = "meta-llama/Llama-3.1-8B-Instruct",
    draft_model: Annotated[str, _own_variable("DRAFT_MODEL", "The same.")] = "meta-llama/Llama-3.2-1B-Instruct",
    prompt: Annotated[
        str, _own_variable("PROMPT", "What the models answer.")
    ] = "Explain stochastic computing in two sentences.",
    new_tokens: Annotated[int, _own_variable("NEW_TOKENS", "Tokens to decode.", min=1)] = 128,
    gamma: Annotated[int, _own_variable("GAMMA", "Tokens that the draft proposes a block.", min=1)] = 4,
    do_sample: Annotated[bool, _own_variable("DO_SAMPLE", "Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, _own_variable("TEMPERATURE", "Of the draws.")] = 1.0,
    sc_prec: Annotated[int, _own_variable("SC_PREC", "Bits of an SC operand.", min=2, max=8)] = 8,
    stoc_lens: Annotated[
        str, _own_variable("STOC_LENS", "Stream lengths of both models, commas between them.")
    ] = "256,128,64,32",
    sc_attn_granularity: Annotated[
        str, _own_variable("SC_ATTN_GRANULARITY", "Scope of attention's scales: causal, per_row, per_head, per_tensor.")
    ] = "causal",
    seed: Annotated[int, _own_variable("SEED", "Of the draws of tokens.", min=0)] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="cuda where there is a GPU, else cpu")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of all that is not SC.", show_default="float16 on a GPU, float32 on the CPU")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Of the SC matmul.", show_default="cuda or cpu")] = None,
) -> None:
    """Decode one prompt in floating point and at several stream lengths; the models are loaded once."""
    from scspec.sweep import Sweep, point_lines, run_sweep

    checked = Sweep.of(
        target_model=target_model,
        draft_model=draft_model,
        prompt=prompt,
        new_tokens=new_tokens,
        gamma=gamma,
        do_sample=do_sample,
        temperature=temperature,
        stoc_lens=stoc_lens,
        sc_prec=sc_prec,
        sc_granularity=sc_attn_granularity,
        seed=seed,
        device=device,
        dtype=dtype,
        backend=backend,
    )
    print(f"device {checked.device}, dtype {checked.dtype}, backend {checked.backend}", flush=True)
    for point in run_sweep(checked):
        print("\n".join(point_lines(point)), flush=True)
