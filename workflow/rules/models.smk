# Models are fetched by a local step: compute nodes may have no network, and cells run with the hub offline.


wildcard_constraints:
    model="[^/]+",


rule fetch_model:
    output:
        "results/models/{model}.json",
    log:
        "results/logs/models/{model}.log",
    localrule: True
    params:
        name=lambda wildcards: MODELS[wildcards.model],
    shell:
        "{PYTHON:q} -m scspec models fetch {params.name:q} --manifest {output:q} > {log:q} 2>&1"
