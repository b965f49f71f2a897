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
    """Passes Snakemake's log records to the display."""

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

    @property
    def writes_to_stream(self) -> bool:
        """Return True: it replaces Snakemake's own output."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """Return False: Snakemake writes its own log file."""
        return False

    @property
    def has_filter(self) -> bool:
        """Return True: the display chooses what is shown."""
        return True

    @property
    def has_formatter(self) -> bool:
        """Return True: the display formats the messages."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """Return False: it shows no graph."""
        return False
