"""Snakemake's logger plugin `retort`: `snakemake --logger retort`, and every `retort run`.

Snakemake finds plugins by the name of their module, which is why this one stands outside the package. It is imported
by every snakemake command, so nothing heavy may be imported here.
"""

from dataclasses import dataclass, field
from logging import LogRecord
from pathlib import Path

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.settings import LogHandlerSettingsBase


@dataclass
class LogHandlerSettings(LogHandlerSettingsBase):
    """What `--logger-retort-...` sets."""

    summary: Path | None = field(
        default=None,
        metadata={
            "help": "A text file that is printed at the end of a run that went well",
            "type": Path,
        },
    )


class LogHandler(LogHandlerBase):
    """Hands Snakemake's events to the display."""

    def __post_init__(self) -> None:
        """Open the display; from now on it alone writes to the terminal."""
        from retort.pipeline.run_display import RunDisplay

        summary = self.settings.summary if isinstance(self.settings, LogHandlerSettings) else None
        self._display = RunDisplay(
            is_dry_run=self.common_settings.dryrun,
            is_quiet=bool(self.common_settings.quiet),
            summary=summary,
        )

    def emit(self, record: LogRecord) -> None:
        """Show a record, or take it in."""
        try:
            self._display.take(record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """End the display, which shows the table."""
        self._display.close()
        super().close()

    @property
    def writes_to_stream(self) -> bool:
        """It replaces Snakemake's own output."""
        return True

    @property
    def writes_to_file(self) -> bool:
        """Snakemake's own log file is written as ever."""
        return False

    @property
    def has_filter(self) -> bool:
        """It chooses itself what is shown."""
        return True

    @property
    def has_formatter(self) -> bool:
        """It words itself what is shown."""
        return True

    @property
    def needs_rulegraph(self) -> bool:
        """It shows no graph."""
        return False
