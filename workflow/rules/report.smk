# Cells -> pages and the table of all. Of a grid that is not finished, by hand:
# python -m scspec report --plan results/plan.json --output FILE
# `snakemake --report FILE.html` carries the pages of `report()`, which hold their charts.

PAIRS = list(dict.fromkeys(cell.pair for cell in CELLS.values()))


rule report:
    input:
        cells=[cell.path() for cell in CELLS.values()],
        quality=[its.path() for its in QUALITY.values()],
        plan="results/plan.json",
    output:
        html=report("reports/index.html", category="Report"),
        pairs=report([f"reports/pairs/{pair}.html" for pair in PAIRS], category="Pairs"),
        cells=directory("reports/cells"),
        tables=["reports/index.csv", "reports/index.parquet"],
    log:
        "results/logs/report.log",
    localrule: True
    shell:
        "{PYTHON:q} -m scspec report --plan {input.plan:q} --output {output.html:q} > {log:q} 2>&1"
