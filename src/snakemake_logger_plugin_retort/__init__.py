"""Snakemake's logger plugin `retort`, for `snakemake --logger retort` and `retort run`.

It is outside the package because Snakemake finds plugins by the name of a top-level module. Every snakemake command
imports it, so it may import nothing heavy.
"""

from dataclasses import dataclass, field
from logging import LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    """The options `--logger-retort-...`."""

    summary: Path | None = field(
        default=None,
        metadata={
            "help": "A text file to print at the end of a successful run",
            "type": Path,
        },
    )


class LogHandler(LogHandlerBase):
    """Passes Snakemake's log records to the display, which takes the place of Snakemake's own output."""

    writes_to_stream = True
    writes_to_file = False  # Snakemake writes its own
    has_filter = True  # the display chooses what is shown, and formats it
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        """Open the display, which from now on is the only one to write to the terminal."""
        from retort.pipeline.run_display import RunDisplay

        summary = self.settings.summary if isinstance(self.settings, LogHandlerSettings) else None
        self._display = RunDisplay(
            is_dry_run=self.common_settings.dryrun,
            is_quiet=bool(self.common_settings.quiet),
            summary=summary,
        )

    def emit(self, record: LogRecord) -> None:
        """Pass on a record."""
        try:
            self._display.take(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Close the display, which shows the summary."""
        self._display.close()
        super().close()
