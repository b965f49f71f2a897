# All runs side by side: a table for the terminal, and a web page.


rule report:
    input:
        metrics=ancient(get_all_metrics),
        benchmarks=ancient(get_all_benchmarks),
    output:
        html=REPORT,
        table=REPORT.replace("report.html", "summary.csv"),
        text=REPORT.replace("report.html", "summary.txt"),
    log:
        f"logs/report/{PROJECT.report_id}.log",
    localrule: True
    params:
        **command("report"),
        estimate=ESTIMATE,
        tokens=[f"{tokens.folder}/index.json" for tokens in PROJECT.tokens.values()],
        caches=[f"{cache.folder}/manifest.json" for cache in PROJECT.logits.values()],
    message:
        "Writing the report"
    shell:
        "{params.script} --config {params.config:q} --metrics {input.metrics:q}"
        " --benchmarks {input.benchmarks:q} --estimate {params.estimate:q} --tokens {params.tokens:q}"
        " --caches {params.caches:q} --output {output.html:q} >> {log:q} 2>&1"
