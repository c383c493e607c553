# The numbers of threads, of GPUs and of prompts side by side change no result and are not among what Snakemake compares.
# A cell is stale when its JSON line changes, its file is missing, or this rule's shell text is edited. A model that
# is fetched again (`-R fetch_model`) changes no cell. But a manifest that was deleted does, as soon as any cell needs
# it: Snakemake ignores the time of an `ancient` input only as long as the file exists.


wildcard_constraints:
    cell="[^/]+/[^/]+/[^/]+",


# A machine's GPUs hold one cell at a time unless `--resources gpus=N` allows more, which then share the first ones: a
# cell takes GPUs from number 0 on. A cluster gives each job GPUs of its own, so this limit does not count there.
resource_scopes:
    gpus="local",


if "gpus" not in workflow.global_resources:
    workflow.register_resource("gpus", EXPERIMENT.gpus)


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
        "{PYTHON:q} -m scspec run-cell {params.cell:q} --threads {threads}"
        " --prompts-per-batch {EXPERIMENT.prompts_per_batch} --gpus {EXPERIMENT.gpus} --output {output:q} > {log:q} 2>&1"
