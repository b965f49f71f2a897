# Retort: distil a large language model into a small one, from a cache of its distributions.
#
#   snakemake --cores 8 --resources gpu=8          run the config on one machine
#   snakemake -n                                   show what would run, and why
#   snakemake --cores 2 --configfile mine.yaml     use your own config instead of the demo's
#
# Every path contains a digest of what defines its content, so an existing file is always up to date: inputs are
# ancient(), and dates re-run nothing. See docs/design.md.
from snakemake.utils import min_version

min_version("9.27")


# A config on the command line replaces the demo's instead of being merged into it. A module gets its config from the
# Snakefile that uses it.
if workflow.modifier.is_main_snakefile() and not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/config.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/machines.smk"
include: "workflow/rules/messages.smk"
include: "workflow/rules/corpus.smk"
include: "workflow/rules/teacher.smk"
include: "workflow/rules/student.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


rule all:
    input:
        REPORT,
    localrule: True


# Returning to an earlier config runs nothing, so link to its report now.
point_to_report()


onstart:
    prepare()


onsuccess:
    point_to_report()
    remove_long_configs()


onerror:
    cancel_slurm_jobs()
    explain_failures()
