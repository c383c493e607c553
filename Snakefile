# One cell = one Parquet file = one target. What is built, and from what: workflow/rules/.


configfile: "config.yaml"


include: "workflow/rules/plan.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        [cell.path() for cell in CELLS.values()],
        rules.report.output,
