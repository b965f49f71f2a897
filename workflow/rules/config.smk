# The config as it is written, the artifacts that it makes, and their folders.
# Every job parses this file again, so nothing here may import torch.
import shlex
import sys
from pathlib import Path

from retort.artifacts.build import build_project
from retort.artifacts.jobs import Jobs, write_argument
from retort.config.config_files import load_source, locate, read_files
from retort.config.sweeps import prefer_command_line
from retort.config.yaml_source import Source
from snakemake.common.configfile import load_configfile
from snakemake.exceptions import WorkflowError
from snakemake.io import flag
from snakemake.path_modifier import PATH_MODIFIER_FLAG
from snakemake.utils import update_config


def place_outputs(config):
    """Return the config with the `prefix` of a module in its output folders, when another Snakefile uses this one.

    Snakemake adds a module's prefix to its rules' paths, but not to flags. So it is added to the folders here, and not
    again to inputs and outputs, which are below them. Logs get it from Snakemake.
    """
    modifier = workflow.modifier.path_modifier

    def keep(path, property=None):
        if property not in ("input", "output") or callable(path):
            return type(modifier).modify(modifier, path, property)
        return flag(modifier.apply_default_storage(path), PATH_MODIFIER_FLAG)

    output = config.get("output") or {}
    if not isinstance(output, dict):
        return config  # load_source will refuse it
    output = dict(output)
    for key, default in {"results_dir": "results", "cache_dir": None}.items():
        folder = output.get(key, default)
        if folder and "://" not in folder:
            output[key] = modifier.replace_prefix(f"{folder}/").removesuffix("/")
    modifier.modify = keep
    return {**config, "output": output}


def read_source():
    """Return the config as it is written, with lines: the files and --config are read again, as Snakemake merges them.

    Lines are not known of a module's config, nor of one that another Snakefile has changed.
    """
    if not workflow.modifier.is_main_snakefile():
        return Source(place_outputs(config))
    settings = workflow.config_settings
    files = workflow.configfiles[len(settings.configfiles) :]  # of `configfile:`
    merged = {}
    for path in files:
        update_config(merged, load_configfile(path))
    update_config(merged, settings.overwrite_config)
    if merged == config:
        paths = [Path(path).absolute() for path in [*files, *settings.configfiles]]
        if source := read_files(paths, settings.config):
            return source
    return Source(prefer_command_line(config, settings.config))


SOURCE = Source({})
try:
    SOURCE = read_source()
    PROJECT = build_project(load_source(SOURCE))
except ValueError as error:
    raise WorkflowError(f"Nothing was started. {locate(error, SOURCE)}") from None

WHOLE_CONFIG = config = SOURCE.values  # as written: a run may be named no, or 010

OUTPUT = next(iter(PROJECT.runs.values())).config.output
RESULTS = OUTPUT.results_dir
CACHE = OUTPUT.cache_folder
# With the names of the config files, which each result records.
SOURCES = ", ".join(Path(file).name for file in workflow.configfiles)
LONG_CONFIGS = Path(RESULTS) / ".configs"


def write_config(content):
    """Return a `--config` for the command line; only now it is known whether this is a dry run."""
    return write_argument(content, LONG_CONFIGS, is_dry_run=workflow.dryrun)


JOBS = Jobs(PROJECT, source=SOURCES, write=write_config)
CHECK = f"{RESULTS}/checks/{PROJECT.check_id}/inputs.json"
ESTIMATE = CHECK.replace("inputs.json", "estimate.json")
REPORT = f"{RESULTS}/reports/{PROJECT.report_id}/report.html"
PYTHON = shlex.quote(sys.executable)
# Relative to this file; workflow.basedir would be that of a Snakefile that uses this one as a module.
WORKFLOW = Path(workflow.current_basedir.get_path_or_uri(secret_free=False)).parent
SCRIPTS = f"{PYTHON} {shlex.quote(str(WORKFLOW / 'scripts'))}/{{}}.py"
