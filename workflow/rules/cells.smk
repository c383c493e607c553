from scspec.gpus import visible_gpus

# The numbers of threads, of GPUs and of prompts side by side change no result and are not among what Snakemake compares.
# A cell is stale when its JSON line changes, its file is missing, or this rule's shell text is edited. A model that
# is fetched again (`-R fetch_model`) changes no cell. But a manifest that was deleted does, as soon as any cell needs
# it: Snakemake ignores the time of an `ancient` input only as long as the file exists.


wildcard_constraints:
    cell="[^/]+/[^/]+/[^/]+",


# As many cells at a time as this machine's GPUs have room for (`--resources gpus=N`: another limit); which GPU a cell
# gets is settled when it starts (scspec/gpus.py). A cluster gives each job GPUs of its own: no limit there. Where there
# are fewer GPUs than one cell asks for, the cell says so, and Snakemake is to start it.
resource_scopes:
    gpus="local",


if EXPERIMENT.device == "cuda" and "gpus" not in workflow.global_resources:
    room = len(visible_gpus()) * EXPERIMENT.cells_per_gpu
    workflow.register_resource("gpus", max(room, EXPERIMENT.gpus))


rule cell:
    input:
        lambda wildcards: ancient(CELLS[wildcards.cell].manifests()),
    output:
        "results/cells/{cell}.parquet",
    log:
        "results/logs/{cell}.log",
    threads: EXPERIMENT.threads_per_cell
    resources:
        gpus=EXPERIMENT.gpus if EXPERIMENT.device == "cuda" else 0,
    params:
        cell=lambda wildcards: CELLS[wildcards.cell].to_json(),
    shell:
        "HF_HUB_OFFLINE=1 {PYTHON:q} -m scspec run-cell {params.cell:q} --threads {threads}"
        " --prompts-per-batch {EXPERIMENT.prompts_per_batch} --gpus {EXPERIMENT.gpus}"
        " --cells-per-gpu {EXPERIMENT.cells_per_gpu} --output {output:q} > {log:q} 2>&1"
