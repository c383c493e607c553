# Cells -> one HTML file and its table. Of a grid that is not finished, by hand:
# python -m scspec report --plan results/plan.json --output FILE


rule report:
    input:
        cells=[cell.path() for cell in CELLS.values()],
        quality=[its.path() for its in QUALITY.values()],
        plan="results/plan.json",
    output:
        html="reports/index.html",
        tables=["reports/index.csv", "reports/index.parquet"],
    log:
        "results/logs/report.log",
    localrule: True
    shell:
        "{PYTHON:q} -m scspec report --plan {input.plan:q} --output {output.html:q} > {log:q} 2>&1"
