from scspec.gpus import visible_gpus

# The numbers of threads, of GPUs and of prompts side by side change no result and are not among what Snakemake compares.
# A cell is stale when its JSON line changes, its file is missing, or this rule's shell text is edited. A model that
# is fetched again (`-R fetch_model`) changes no cell. But a manifest that was deleted does, as soon as any cell needs
# it: Snakemake ignores the time of an `ancient` input only as long as the file exists.


wildcard_constraints:
    trajectory="[^/]+/[^/]+",
    predictions="[^/]+/[^/]+/[^/]+",


# As many cells at a time as this machine's GPUs have room for (`--resources gpus=N`: another limit); which GPU a cell
# gets is settled when it starts (scspec/gpus.py). A cluster gives each job GPUs of its own: no limit there. Where there
# are fewer GPUs than one cell asks for, the cell says so, and Snakemake is to start it.
resource_scopes:
    gpus="local",


if EXPERIMENT.device == "cuda" and "gpus" not in workflow.global_resources:
    room = len(visible_gpus()) * EXPERIMENT.cells_per_gpu
    workflow.register_resource("gpus", max(room, EXPERIMENT.gpus))


GPUS = EXPERIMENT.gpus if EXPERIMENT.device == "cuda" else 0
COUNTS = f"--gpus {EXPERIMENT.gpus} --cells-per-gpu {EXPERIMENT.cells_per_gpu}"
BATCH = f"--prompts-per-batch {EXPERIMENT.prompts_per_batch}"


rule cell:
    input:
        lambda wildcards: ancient(CELLS[wildcards.cell].manifests()),
    output:
        "results/cells/{cell}.parquet",
    log:
        "results/logs/{cell}.log",
    wildcard_constraints:
        cell="[^/]+/[^/]+/[^/]+(?<!_replay)",
    threads: EXPERIMENT.threads_per_cell
    resources:
        gpus=GPUS,
    params:
        cell=lambda wildcards: CELLS[wildcards.cell].to_json(),
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON:q} -m scspec run-cell {params.cell:q} --threads {threads} {BATCH} {COUNTS}"
        " --output {output:q} > {log:q} 2>&1"


# Method replay: a cell derives from the target's texts and the draft's predictions on them, which many cells share.


rule trajectory:
    input:
        lambda wildcards: ancient(TRAJECTORIES[wildcards.trajectory].manifests()),
    output:
        "results/trajectories/{trajectory}.parquet",
    log:
        "results/logs/trajectories/{trajectory}.log",
    threads: EXPERIMENT.threads_per_cell
    resources:
        gpus=GPUS,
    params:
        trajectory=lambda wildcards: TRAJECTORIES[wildcards.trajectory].to_json(),
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON:q} -m scspec run-trajectory {params.trajectory:q} --threads {threads} {BATCH} {COUNTS}"
        " --output {output:q} > {log:q} 2>&1"


rule predictions:
    input:
        lambda wildcards: ancient(PREDICTIONS[wildcards.predictions].manifests()),
        trajectory=lambda wildcards: PREDICTIONS[
            wildcards.predictions
        ].trajectory.path(),
    output:
        "results/predictions/{predictions}.parquet",
    log:
        "results/logs/predictions/{predictions}.log",
    threads: EXPERIMENT.threads_per_cell
    resources:
        gpus=GPUS,
    params:
        predictions=lambda wildcards: PREDICTIONS[wildcards.predictions].to_json(),
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON:q} -m scspec run-predictions {params.predictions:q} --threads {threads} {COUNTS}"
        " --trajectory {input.trajectory:q} --output {output:q} > {log:q} 2>&1"


rule replay:
    input:
        trajectory=lambda wildcards: CELLS[wildcards.cell]
        .predictions()
        .trajectory.path(),
        predictions=lambda wildcards: CELLS[wildcards.cell].predictions().path(),
    output:
        "results/cells/{cell}.parquet",
    log:
        "results/logs/{cell}.log",
    wildcard_constraints:
        cell="[^/]+/[^/]+/[^/]+_replay",
    localrule: True
    params:
        cell=lambda wildcards: CELLS[wildcards.cell].to_json(),
    shell:
        "{PYTHON:q} -m scspec replay {params.cell:q} --trajectory {input.trajectory:q}"
        " --predictions {input.predictions:q} --output {output:q} > {log:q} 2>&1"


# Of each target in SC, whatever gamma and the draft are.
rule quality:
    input:
        lambda wildcards: ancient(QUALITY[wildcards.quality].manifests()),
        trajectory=lambda wildcards: QUALITY[wildcards.quality].trajectory.path(),
    output:
        "results/quality/{quality}.parquet",
    log:
        "results/logs/quality/{quality}.log",
    wildcard_constraints:
        quality="[^/]+/[^/]+",
    threads: EXPERIMENT.threads_per_cell
    resources:
        gpus=GPUS,
    params:
        quality=lambda wildcards: QUALITY[wildcards.quality].to_json(),
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON:q} -m scspec run-quality {params.quality:q} --threads {threads} {COUNTS}"
        " --trajectory {input.trajectory:q} --output {output:q} > {log:q} 2>&1"
