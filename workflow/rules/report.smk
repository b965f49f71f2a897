# All runs side by side: a table for the terminal, a page for people.


rule report:
    input:
        ancient(get_all_metrics),
    output:
        html=REPORT,
        table=REPORT.replace("report.html", "summary.csv"),
        text=REPORT.replace("report.html", "summary.txt"),
    log:
        f"logs/report/{PROJECT.report_id}.log",
    params:
        script=SCRIPTS.format("report"),
    message:
        "Writing the report"
    shell:
        "{params.script} --metrics {input:q} --output {output.html:q}"
        " >> {log:q} 2> >(trap '' TERM; tee -a {log:q} >&2)"
