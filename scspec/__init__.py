"""scspec: stochastic-computing language models under exact speculative decoding.

config -> cells -> (prompts, models -> patching) -> decoding (over sc + invariant)
       -> results -> stats -> charts -> report

    config, cells        YAML -> Experiment -> the jobs there are
    jobs                 what a job is: a line of JSON, a Parquet file, the models it needs
    prompts, prompt_rows prompt files -> what each row says -> token ids
    models, aliases,     where weights come from; the int8 weights of the draft in drafts/;
    conversion, int8,    devices and dtypes; and one model instance rewired to SC
    placement, patching
    sc, invariant        the stochastic matmul; batch-invariant float arithmetic
    decoding             plain and speculative decoding, exact
    task, preflight      what jobs that run models share, and where these meet; what is checked before they load
    run, replay, quality the jobs: a cell as a loop; cells from texts and predictions; a target beside itself in float
    results, stats       Parquet rows -> estimates with intervals
    compare              two cells or grids -> differences
    charts, report       estimates -> charts -> HTML: an index, a page per pair, a page per cell
    hardware, provenance MACs; where a result came from
    estimate, sweep      what a grid would cost; one prompt at several lengths
    inventory, doctor    which models are here; what scspec needs of a machine
    cli                  the command line

The names below are imported when first used, so that planning a grid does not load torch.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "sc_matmul": "scspec.sc.matmul",
    "SC_CONFIG_DEFAULTS": "scspec.sc.knobs",
    "patch_model": "scspec.patching",
    "load_model": "scspec.models",
    "load_spec_models": "scspec.models",
    "generate": "scspec.decoding",
    "generate_cached": "scspec.decoding",
    "generate_autoregressive": "scspec.decoding",
    "run_cell": "scspec.run",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'scspec' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
