# The numbers of threads and of prompts side by side change no result and are not among what Snakemake compares.
# A cell is stale when its JSON line changes, its file is missing, or this rule's shell text is edited. A model that
# is fetched again (`-R fetch_model`) changes no cell. But a manifest that was deleted does, as soon as any cell needs
# it: Snakemake ignores the time of an `ancient` input only as long as the file exists.


wildcard_constraints:
    cell="[^/]+/[^/]+/[^/]+",


rule cell:
    input:
        lambda wildcards: ancient(CELLS[wildcards.cell].manifests()),
    output:
        "results/cells/{cell}.parquet",
    log:
        "results/logs/{cell}.log",
    threads: EXPERIMENT.threads_per_cell
    params:
        cell=lambda wildcards: CELLS[wildcards.cell].to_json(),
    shell:
        "{PYTHON:q} -m scspec run-cell {params.cell:q} --threads {threads}"
        " --prompts-per-batch {EXPERIMENT.prompts_per_batch} --output {output:q} > {log:q} 2>&1"
