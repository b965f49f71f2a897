"""The table of `make test-gpu`, as Markdown for docs/benchmarks.md."""

from dataclasses import dataclass, field


@dataclass
class Table:
    """Rows of (what, found), and what benchmarks printed, by command."""

    machine: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)
    printed: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, found: str) -> None:
        """Add a row."""
        self.rows.append((what, found))

    def format(self) -> str:
        """Return the whole as Markdown."""
        lines = [
            "## On a GPU",
            "",
            f"`make test-gpu`: {self.machine}.",
            "",
            "| what | found |",
            "|---|---|",
        ]
        lines += [f"| {what} | {found} |" for what, found in self.rows]
        for command, text in self.printed.items():
            lines += ["", f"`{command}`:", "", "```", text.strip(), "```"]
        return "\n".join(lines) + "\n"
