# Retort: distil a large language model into a small one, from a cache of its distributions.
#
#   snakemake --cores 8 --resources gpu=8          everything the config asks for, on one machine
#   snakemake -n                                   what would run, and why
#   snakemake --cores 2 --configfile mine.yaml     with your own config instead of the demo's
#
# Every path holds a digest of what is in it, so existence is all that matters: inputs are ancient(), and nothing
# is ever re-made because of a date. docs/design.md tells the whole story.
from snakemake.utils import min_version

min_version("9.27")


# A config given on the command line replaces the demo's; it is not merged into it. A module is given its own.
if workflow.modifier.is_main_snakefile() and not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


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


# Going back to an earlier config makes nothing, but its report is the one to look at.
point_to_report()


onstart:
    greet()


onsuccess:
    point_to_report()


onerror:
    cancel_forgotten_jobs()
    explain_failures()
