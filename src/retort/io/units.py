"""Numbers with their units, for people."""


def format_bytes(number: float, *, unit: str = "bytes") -> str:
    """Return a number of bytes in decimal units: 812 bytes, 3.4 MB, 1.2 TB; `unit`: that of less than a kB."""
    value = float(number)
    for name in (unit, "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} {name}" if name == unit else f"{value:.1f} {name}"
        value /= 1000
    return f"{value:,.1f} TB"


def format_duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours: 12.3 s, 4.5 min, 3.2 h."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_count(number: float) -> str:
    """Return a number with at most three digits, and its unit: 260k, 1.23B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
